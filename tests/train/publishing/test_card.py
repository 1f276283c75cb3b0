"""What may be published and what the card says: nothing private, nothing unproven, speeds that were measured."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from runtime import load_adapter
from tests.helpers.hub.server import TOKEN
from tests.helpers.paths import SHIPPED
from tests.helpers.publication import BASE, NAME, refusal, rename
from train.cli.app import app
from train.evaluation.report import summarize
from train.publishing.assembly import write_card
from train.publishing.publish import publish
from train.publishing.staging import Claims

# huggingface_hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


def test_nothing_of_this_machine_is_published(hub, folder, fitted, tmp_path):
    publish(folder, NAME)
    run = yaml.safe_load(hub.files(NAME)["run.yaml"])
    assert run["settings"]["model_name_or_path"] == BASE and run["settings"]["prompts"] == ["prompts.jsonl"]
    assert not {"output_dir", "corpus_dir"} & run["settings"].keys()
    for private in (TOKEN, str(tmp_path), str(fitted), "/tmp/"):
        assert not [name for name, content in hub.files(NAME).items() if private.encode() in content]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.yaml", "settings: {seed: 0, note: /data/me/corpus.txt}", 'run.yaml: the path "/data/me/corpus.txt"'),
        ("run.yaml", "settings: {note: 'C:\\Users'}", "run.yaml: the path"),
        ("run.yaml", "settings: {note: somebody@host}", "run.yaml: the user's name"),
        ("run.yaml", "settings: {note: hf_" + "a" * 30 + "}", "run.yaml: a token"),
        ("run.yaml", "settings: {note: " + TOKEN + "}", "run.yaml: a token"),
        ("costs.json", json.dumps({"file": "~/costs"}), "costs.json: the path"),
        ("speed.png", "-----BEGIN PRIVATE KEY-----", "speed.png: a token"),
    ],
)
def test_what_would_give_something_away_is_not_published(hub, folder, monkeypatch, name, text, expected):
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    (folder / name).write_text(text)
    assert expected in refusal(folder, NAME)
    assert hub.log == []


def test_the_card_is_complete(hub, folder):
    publish(folder, NAME)
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    data = card.data
    assert (data.library_name, data.base_model, data.license) == ("specbound", BASE, "apache-2.0")
    assert (data.base_model_relation, data.pipeline_tag) == ("adapter", "text-generation")
    assert "custom_generate" in data.tags and data.model_name == NAME
    calibrated = json.loads((folder / "calibration.json").read_text())
    figures = {(result.metric_type, result.metric_name): result.metric_value for result in data.eval_results}
    length = round(calibrated["replay"]["mean_accepted_length"], 4)
    assert figures["mean_accepted_length", "mean accepted length, replayed"] == length
    assert figures["agreement", "agreement with the base, layer 2"] == round(calibrated["exits"]["2"]["agreement"], 4)
    assert NAME in card.text and "THIS_ADAPTER" not in card.text


def without_agreement(calibrated):
    del calibrated["agreement"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"license": None}, "it states no licence: give one, such as --license apache-2.0"),
        ({"base_model_revision": None}, "it names no revision of its base"),
        ({"base_model_revision": "main"}, "expected a commit (40 hexadecimal digits)"),
        ({"base_model_name_or_path": "outputs/base/tiny"}, "'outputs/base/tiny', a folder of this machine"),
        (
            lambda calibrated: calibrated["agreement"].update(by_run=1.0, by_replay=1.5),
            "acceptance disagree, 1.0 and 1.5",
        ),
        (lambda calibrated: calibrated["agreement"].update(by_run=0), "acceptance disagree"),
        (without_agreement, "calibration.json is not whole (KeyError: 'agreement')"),
        (lambda calibrated: calibrated["exits"].pop("2"), "of other exits"),
        (lambda calibrated: calibrated["exits"]["2"].update(agreement=7), "impossible figures"),
        (lambda calibrated: calibrated.update(replay=[]), "calibration.json is not whole"),
    ],
)
def test_what_must_not_be_published(hub, folder, change, expected):
    if isinstance(change, dict):
        rename(folder, **change)
    else:
        calibrated = json.loads((folder / "calibration.json").read_text())
        change(calibrated)
        (folder / "calibration.json").write_text(json.dumps(calibrated))
    assert expected in refusal(folder, NAME)
    assert hub.log == []


def test_all_reasons_are_in_one_line(hub, fitted, tmp_path):
    shutil.copytree(fitted, tmp_path / "adapter")
    rename(tmp_path / "adapter", license=None)
    (tmp_path / "adapter" / "calibration.json").unlink()
    message = refusal(tmp_path / "adapter", NAME)
    assert "--base-model ORG/NAME --base-revision COMMIT" in message
    assert "no licence" in message and "no calibration.json" in message
    text = (tmp_path / "adapter" / "config.json").read_text().replace('"apache-2.0"', '"mit"')
    (tmp_path / "adapter" / "config.json").write_text(text.replace('"license": null', '"license": "mit"'))
    assert "was changed after it was written" in refusal(tmp_path / "adapter", NAME)


@pytest.fixture
def bench(folder, tmp_path):
    """A report of `specbound bench` on the adapter, with a path of this machine among its settings."""

    def run(seconds):
        speculation = {"rounds": 10, "resting_rounds": 0, "parts": {}, "drafted": {"2": 9}, "accepted": {"2": 6}}
        return {"seconds": seconds, "tokens": 20, "first_token": 0.1, "identical": True} | speculation

    records = [{"task": task, "runs": {"stock": run(4), "specbound": run(2)}} for task in ("qa", "rag")]
    found = {
        "complete": True,
        "settings": {"prompts": "spec/question.jsonl", "max_new_tokens": 20, "base_model": str(tmp_path)},
        "adapter_sha256": load_adapter(folder).config.weights_sha256,
        "titles": {"stock": "transformers' generate", "specbound": "the adapter as it is"},
        "hardware": "A machine, 2 cores", "dtype": "bfloat16", "threads": 2,
        "versions": {"torch": "2", "transformers": "5"},
        **summarize(records), "records": records,
    }  # fmt: skip
    path = tmp_path / "report.json"
    path.write_text(json.dumps(found))
    return path


def test_speed_by_task_is_on_the_card(hub, folder, bench):
    """Given, or lying in the folder: a table with hardware and baseline, results for the Hub, no single runs."""
    result = CliRunner().invoke(app, ["publish", str(folder), NAME, "--bench", str(bench)])
    assert result.exit_code == 0, result.stderr
    given = hub.files(NAME)
    card = given["README.md"].decode()
    assert "| specbound | 2.00 | 2.00 | 2.00 (2.00 to 2.00) | 10.0 |" in card and "A machine, 2 cores" in card
    assert "spec/question.jsonl" in card and "Not measured" not in card
    kept = json.loads(given["bench.json"])
    assert "records" not in kept and kept["settings"]["base_model"] == BASE
    results = ModelCard(card).data.eval_results
    speeds = {one.dataset_name: one.metric_value for one in results if one.metric_type == "speedup"}
    assert len(speeds) == 3 and set(speeds.values()) == {2.0}
    shutil.copyfile(bench, folder / "bench.json")
    assert not publish(folder, NAME).changed
    write_card(folder)
    assert "| specbound | 2.00 | 2.00 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"adapter_sha256": "0" * 64}, "bench.json is of other heads"),
        ({"complete": False}, "cut short: `specbound bench --resume`"),
        ({"methods": {}}, "is no report of `specbound bench`"),
        ({"by_task": {"qa": {"specbound": {"identical_prompts": 1, "prompts": 2}}}}, "is no report of"),
        ({"hardware": "/home/me/machine"}, 'README.md: the path "/home/me/machine"'),
    ],
)
def test_a_benchmark_of_something_else_is_not_published(hub, folder, bench, change, expected):
    bench.write_text(json.dumps(json.loads(bench.read_text()) | change))
    assert expected in refusal(folder, NAME, claims=Claims(bench=bench))
    assert hub.log == []


def test_a_benchmark_with_other_ids_is_not_published(hub, folder, bench):
    found = json.loads(bench.read_text())
    found["by_task"]["qa"]["specbound"]["identical_prompts"] = 0
    bench.write_text(json.dumps(found))
    assert "other ids than stock" in refusal(folder, NAME, claims=Claims(bench=bench))
    assert "is no file" in refusal(folder, NAME, claims=Claims(bench=bench.with_name("none.json")))


def test_the_shipped_card_is_made_from_the_shipped_figures(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "adapter")
    write_card(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == (SHIPPED / "README.md").read_text()
