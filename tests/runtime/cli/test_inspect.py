"""`specbound inspect`: what it says of good and bad adapters, to people and to programs."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from runtime import TemperatureSchedule, save_adapter
from train.cli.app import app

BLOCKED = (
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "sklearn",
    "matplotlib",
    "pyarrow",
    "gguf",
    "tqdm.rich",
)
CALIBRATION = {
    "exits": {
        "2": {"agreement": 0.4321, "ece_before": 0.2, "ece_after": 0.0123, "temperature": 1.3},
        "4": {"agreement": 0.7, "ece_before": 0.1, "ece_after": 0.03, "temperature": 1.1},
    }
}


@pytest.fixture
def folder(tmp_path, make_model, make_adapter):
    made = make_adapter(make_model(), temperatures=TemperatureSchedule("fitted", {2: 1.3, 4: 1.125}))

    def write(path):
        (path / "calibration.json").write_text(json.dumps(CALIBRATION))

    save_adapter(made, tmp_path / "adapter", extra=write)
    return tmp_path / "adapter"


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def rows(text):
    """The printed lines by their first word."""
    return {line.split("  ")[0].strip(): " ".join(line.split()) for line in text.splitlines() if line.strip()}


def edit(folder, **changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))


def test_a_good_adapter_for_people(folder):
    result = run(folder)
    assert result.exit_code == 0 and result.stderr == ""
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[1:])  # the first names the folder
    found = rows(result.stdout)
    config = json.loads((folder / "config.json").read_text())
    assert found["valid"] == "valid yes"
    assert found["base"] == "base some-org/tiny-base"
    assert found["revision"] == "revision not stated"
    assert config["base_model_fingerprint"][:23] in found["fingerprint"]
    assert found["heads"] == "heads deep, rank 8, float32"
    assert found["draft vocabulary"] == "draft vocabulary 64 of 128 tokens"
    assert found["license"] == "license apache-2.0"
    assert found["format"] == "format 1, written by specbound " + config["specbound_version"]
    assert (found["exit_threshold"], found["max_exit_layer"]) == ("exit_threshold 0", "max_exit_layer 4")
    assert found["max_draft_tokens"] == "max_draft_tokens 4"
    assert found["size"].endswith(" MB")
    table = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert table == [["2", "1.300", "0.432", "0.200", "0.012"], ["4", "1.125", "0.700", "0.100", "0.030"]]


def test_a_good_adapter_for_programs(folder):
    result = run(folder, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    config = json.loads((folder / "config.json").read_text())
    assert found["valid"] is True and found["warnings"] == [] and found["format"] == 1
    assert found["base"]["fingerprint"] == config["base_model_fingerprint"]
    assert found["tokenizer_fingerprint"] == config["tokenizer_fingerprint"]
    assert found["bounds"] == config["bounds"]
    assert found["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    expected = {"layer": 2, "temperature": 1.3, "agreement": 0.4321, "ece_before": 0.2, "ece_after": 0.0123}
    assert found["exits"][0] == expected


def test_without_calibration_and_with_a_damaged_one(folder):
    (folder / "calibration.json").unlink()
    plain = run(folder)
    assert plain.exit_code == 0 and plain.stderr == "" and "ECE" not in plain.stdout
    assert plain.stdout.splitlines()[-1].split() == ["4", "1.125"]
    for text in (
        "{",
        "[]",
        '{"exits": 3}',
        '{"exits": {"2": {}}}',
        json.dumps(CALIBRATION).replace("0.7", "NaN"),
    ):
        (folder / "calibration.json").write_text(text)
        result = run(folder)
        assert result.exit_code == 0 and result.stdout == plain.stdout
        assert result.stderr.startswith("warning: calibration.json is damaged")
        assert json.loads(run(folder, "--json").stdout)["warnings"]


def test_what_is_not_valid(folder, tmp_path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for adapter, expected in (
        (folder, "damaged"),
        (tmp_path, "config.json cannot be read"),
        (tmp_path / "absent", "does not exist: expected the adapter's folder, or a Hub id"),
        ("nobody/nothing", "the Hub could not give it"),
    ):
        result = run(adapter)
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr.startswith("error: ") and expected in result.stderr
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
        found = run(adapter, "--json")
        assert found.exit_code == 1 and found.stderr == ""
        error = json.loads(found.stdout)
        assert error["valid"] is False and error["adapter"] == str(adapter) and expected in error["error"]


def test_a_revision_of_a_folder_is_refused(folder):
    result = run(folder, "--revision", "main")
    assert result.exit_code == 1 and "leave it out" in result.stderr


def test_warnings_are_told(folder):
    edit(folder, colour="red")
    result = run(folder)
    assert result.exit_code == 0
    assert "warning: " in result.stderr and "unknown keys ['colour']" in result.stderr
    assert len(json.loads(run(folder, "--json").stdout)["warnings"]) == 2  # and it was changed by hand


def test_markup_in_a_name_is_only_text(folder):
    edit(folder, base_model_name_or_path="[bold red]org[/]/base[/nonsense]", license="[link=x]mit")
    result = run(folder)
    assert result.exit_code == 0
    assert rows(result.stdout)["base"] == "base [bold red]org[/]/base[/nonsense]"
    assert rows(result.stdout)["license"] == "license [link=x]mit"


def test_help_names_the_verb():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "inspect" in result.stdout
    assert CliRunner().invoke(app, ["inspct"]).exit_code == 2


def test_the_command_itself_without_the_train_extra(folder):
    """A real process, piped, on a terminal that knows only ASCII."""
    edit(folder, base_model_name_or_path="org/b\u00e4se")
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); from train.cli.app import main; "
    command = [sys.executable, "-c", block + "main()", "inspect", str(folder)]
    environment = {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    good = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert good.returncode == 0, good.stderr
    assert rows(good.stdout)["base"] == "base org/b\\xe4se"
    assert good.stderr.startswith("warning: ") and good.stderr.count("\n") == 1
