"""`specbound`, the command line: the verbs of the runtime and those of fitting. Entry point of the console script."""

from runtime.cli.app import app, run
from train.cli import bench, plan, profile, publish, tune

app.command("profile")(profile.profile_command)
app.command("tune")(tune.tune_command)
app.command("bench")(bench.bench_command)
app.command("publish")(publish.publish_command)
app.command("plan")(plan.plan_command)


def main() -> None:
    """Entry point of the console script."""
    run(app)


if __name__ == "__main__":
    main()
