"""The `specbound` command line: the commands of the runtime and those of fitting."""

from runtime.cli.app import app, run
from train.cli import bench, data, plan, profile, publish, sweep, tune

TRAINING = "Commands for fitting, with the train extra"

app.command("data", rich_help_panel=TRAINING)(data.data_command)
app.command("profile", rich_help_panel=TRAINING)(profile.profile_command)
app.command("sweep", rich_help_panel=TRAINING)(sweep.sweep_command)
app.command("tune", rich_help_panel=TRAINING)(tune.tune_command)
app.command("bench", rich_help_panel=TRAINING)(bench.bench_command)
app.command("publish", rich_help_panel=TRAINING)(publish.publish_command)
app.command("plan", rich_help_panel=TRAINING)(plan.plan_command)


def main() -> None:
    """Entry point of the console script."""
    run(app)


if __name__ == "__main__":
    main()
