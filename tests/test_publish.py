"""Publishing against a Hub on the loopback: what is sent, what is refused, and every request failing in every way."""

import dataclasses
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from loopback_hub import TOKEN
from typer.testing import CliRunner

from runtime import AdapterError, BaseModelMismatch, ConfigError, load_adapter, save_adapter
from train.bench_report import summarize
from train.cli import app
from train.costs import CostTable
from train.fit_exits import main as fit
from train.hub import publish
from train.options import FitConfig
from train.publish import write_card
from train.retune import tune_adapter
from train.staging import Claims, stage
from train.tuning import Held

# huggingface_hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

NAME, BASE = "some-org/tiny-specbound", "some-org/tiny-base"
SHIPPED = Path(__file__).parent.parent / "adapters" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, make_recipe):
    """Folder of a fitted adapter, its base a folder of this machine."""
    folder = tmp_path_factory.mktemp("publish")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        config = FitConfig(**make_recipe(folder, license="apache-2.0"))
        config.sources.update(dict.fromkeys(make_recipe(folder), "flag"))
        fit(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder / "adapter"


@pytest.fixture
def folder(fitted, tmp_path):
    """A copy of it that names a base on the Hub."""
    shutil.copytree(fitted, tmp_path / "adapter")
    rename(tmp_path / "adapter", base_model_name_or_path=BASE, base_model_revision="a" * 40)
    return tmp_path / "adapter"


def rename(folder, **changes):
    config = dataclasses.replace(load_adapter(folder).config, **changes)
    (folder / "config.json").write_text(config.to_json())


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments, **options):
    with pytest.raises(AdapterError) as caught:
        publish(*arguments, **options)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def test_one_private_commit_holds_all_and_nothing_else(hub, folder):
    (folder / "pytorch_model.bin").write_bytes(b"not ours")
    before = hashes(folder)
    found = publish(folder, NAME, tag="v1")
    assert found.changed and found.url == f"{hub.url}/{NAME}"
    repository = hub.repositories[NAME]
    assert repository.private and repository.tags == {"v1": found.commit} and len(repository.commits) == 2
    files = hub.files(NAME)
    files.pop(".gitattributes")
    assert sorted(files) == [
        "README.md", "calibration.json", "config.json", "custom_generate/generate.py", "model.safetensors",
        "precision.png", "reliability.png", "run.yaml", "sources.png", "speed.png", "traces.safetensors",
    ]  # fmt: skip
    for name in ("model.safetensors", "calibration.json", "traces.safetensors", "speed.png"):
        assert files[name] == (folder / name).read_bytes()
    assert hashes(folder) == before


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
        (lambda calibrated: calibrated["exits"]["2"].update(agreement=7), "figures that cannot be"),
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


def test_a_claimed_base_is_loaded_and_compared(hub, fitted, tiny_base, make_model, make_tokenizer, tmp_path):
    base = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    commit = hub.put(BASE, base)
    with pytest.raises(AdapterError, match="names no revision"):
        publish(fitted, NAME, claims=Claims(BASE))
    assert publish(fitted, NAME, claims=Claims(BASE, commit)).changed
    assert json.loads(hub.files(NAME)["config.json"])["base_model_revision"] == commit
    make_model(seed=3).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    other = hub.put("some-org/other", {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()})
    with pytest.raises(BaseModelMismatch, match="other weights"):
        publish(fitted, "some-org/another", claims=Claims("some-org/other", other))
    assert "some-org/another" not in hub.repositories


def test_again_there_is_nothing_to_do_and_a_change_is_one_more_commit(hub, folder):
    first = publish(folder, NAME)
    again = publish(folder, NAME)
    assert (again.commit, again.changed) == (first.commit, False)
    assert not [line for line in hub.log if "/commit/" in line][1:]
    (folder / "sources.png").unlink()
    rename(folder, license="mit")
    sent = len(hub.log)
    second = publish(folder, NAME, tag="v2")
    assert second.changed and "sources.png" not in hub.files(NAME)
    assert b"mit" in hub.files(NAME)["config.json"] and len(hub.repositories[NAME].commits) == 3
    assert not [line for line in hub.log[sent:] if line.startswith("PUT")]
    with pytest.raises(AdapterError, match="has a tag v2 already"):
        rename(folder, license="apache-2.0")
        publish(folder, NAME, tag="v2")
    assert publish(folder, NAME, tag="v3").changed


def test_a_branch_and_a_pull_request(hub, folder):
    publish(folder, NAME, revision="next")
    repository = hub.repositories[NAME]
    assert list(hub.files(NAME)) == [".gitattributes"] and "config.json" in hub.files(NAME, "next")
    proposed = publish(folder, NAME, create_pr=True)
    assert proposed.url == f"{hub.url}/{NAME}/discussions/1" and list(hub.files(NAME)) == [".gitattributes"]
    again = publish(folder, NAME, create_pr=True)
    assert (again.changed, again.url, again.commit) == (False, proposed.url, proposed.commit)
    assert len(repository.proposals) == 1
    with pytest.raises(ConfigError, match="leave out revision and tag"):
        publish(folder, NAME, create_pr=True, tag="v1")


def test_what_is_there_and_not_ours_stays(hub, folder):
    hub.put(NAME, {"config.json": b'{"model_type": "llama"}'}, private=True)
    assert "holds something else" in refusal(folder, NAME)
    hub.put("some-org/open", {".gitattributes": b""})
    assert "is there and public: give --public" in refusal(folder, "some-org/open")
    assert publish(folder, "some-org/open", private=False).changed
    assert "is there and private: leave out --public" in refusal(folder, NAME, private=False)
    assert list(hub.files(NAME)) == ["config.json"]
    hub.repositories["some-org/open"].tags["v1"] = hub.repositories["some-org/open"].branches["main"]
    assert "v1 is a tag" in refusal(folder, "some-org/open", revision="v1", private=False)


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, folder, monkeypatch):
    publish(folder, NAME)
    rename(folder, license="mit")
    real = huggingface_hub.HfApi.create_commit

    def late(self, *arguments, **options):
        repository = hub.repositories[NAME]
        repository.branches["main"] = repository.add({"README.md": b"theirs"}, repository.branches["main"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    assert "was changed by somebody else while this was published" in refusal(folder, NAME)
    assert hub.files(NAME) == {"README.md": b"theirs"}


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """The same folder without pictures and traces, staged once: each test of many faults publishes it often."""
    for path in (*folder.glob("*.png"), folder / "traces.safetensors"):
        path.unlink()
    (tmp_path / "staged").mkdir()
    stage(folder, tmp_path / "staged", NAME, Claims())
    copy = partial(shutil.copytree, tmp_path / "staged", dirs_exist_ok=True)
    monkeypatch.setattr("train.hub.stage", lambda _, target, *rest: copy(target))
    return folder


@pytest.fixture
def requests(hub, small):
    """What one undisturbed publication asks of the Hub, in order, and what is there afterwards."""
    publish(small, "some-org/first", tag="v1")  # the client asks some things only once
    hub.restart()
    publish(small, NAME, tag="v1")
    found, files = list(hub.log), hub.files(NAME)
    assert (
        len(found) > 15
        and "PUT" in str(found)
        and found[-1].startswith("POST /api/models/some-org/tiny-specbound/tag")
    )
    return found, files


@pytest.mark.parametrize("fault", ["503", "429", "408", "drop", "lost"])
def test_a_fault_at_each_request_is_outlived(hub, small, requests, fault):
    before = hashes(small)
    every = 4 if fault in ("503", "408") else 1  # outlived by the same lines as 429
    for number, request in list(enumerate(requests[0], start=1))[::every]:
        hub.restart()
        hub.slept.clear()
        hub.faults = {number: fault}
        found = publish(small, NAME, tag="v1")
        assert hub.files(NAME) == requests[1] and len(hub.repositories[NAME].commits) == 2, request
        assert hub.repositories[NAME].tags == {"v1": found.commit}, request
        assert hub.slept or fault == "lost", request
        assert fault != "429" or "validate-yaml" in request or max(hub.slept) >= 7, request
    assert hashes(small) == before


@pytest.mark.parametrize("status", [500, 403])
def test_a_hub_that_goes_on_failing_from_any_request_on_has_all_or_nothing(hub, small, requests, status):
    before = hashes(small)
    for number, request in enumerate(requests[0], start=1):
        hub.restart()
        hub.hard = (number, status)
        message = refusal(small, NAME, tag="v1")
        assert "the same command goes on" in message and hashes(small) == before
        assert status != 403 or "hf auth login" in message, request
        there = hub.files(NAME) if NAME in hub.repositories else {}
        assert there in ({}, requests[1]) or list(there) == [".gitattributes"], request
        hub.hard = None
        publish(small, NAME, tag="v1")
        assert hub.files(NAME) == requests[1] and len(hub.repositories[NAME].commits) == 2


def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(hub, small, requests):
    for number in range(1, len(requests[0]) + 2):
        hub.restart()
        hub.faults = {number: "lost"}
        publish(small, NAME, create_pr=True)
        assert len(hub.repositories[NAME].proposals) == 1


def test_other_bytes_than_were_sent_are_noticed(hub, folder, monkeypatch):
    publish(folder, NAME)
    files = hub.files(NAME)
    monkeypatch.setattr("loopback_hub.Handler.ranged", lambda self, *rest: (200, b"[]", {}))
    assert "came back from some-org/tiny-specbound with other bytes" in refusal(folder, NAME)
    assert hub.files(NAME) == files


def test_without_a_right_to_write(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 8)
    assert "hf auth login" in refusal(folder, NAME)
    assert "hf auth login" in refusal(folder, NAME, token="hf_" + "other" * 8)
    assert hub.repositories == {}
    assert publish(folder, NAME, token=TOKEN).changed


@pytest.mark.parametrize("name", ["no-organisation", "a/b/c", "a/../b", "a/b c", "", "a/" + "b" * 200, "a/b\n"])
def test_a_name_that_no_repository_has(hub, folder, name):
    with pytest.raises(ConfigError, match="expected ORG/NAME"):
        publish(folder, name)
    assert hub.log == []


def test_the_command(hub, folder, fitted):
    def run(*arguments):
        return CliRunner().invoke(app, ["publish", *map(str, arguments)])

    result = run(folder, NAME, "--tag", "v1", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["changed"] and found["commit"] == hub.repositories[NAME].branches["main"]
    assert "as it was: nothing to do" in run(folder, NAME).stdout
    result = run(fitted, NAME)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "--base-model" in json.loads(run(fitted, NAME, "--json").stdout)["error"]


def test_a_fit_that_could_not_be_published_is_not_begun(make_recipe, tmp_path, monkeypatch):
    wanted = {"push_to_hub": True, "hub_model_id": NAME, "license": "apache-2.0", "model_name_or_path": BASE}
    monkeypatch.setenv("HF_TOKEN", "")
    for change, expected in [
        ({"hub_model_id": None}, "hub_model_id"),
        ({"hub_model_id": "somewhere"}, "expected ORG/NAME"),
        ({"model_name_or_path": str(tmp_path)}, "a base from the Hub"),
        ({"license": None}, "the adapter's licence"),
        ({}, "run `hf auth login`"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            fit(FitConfig(**make_recipe(tmp_path / "out", **wanted | change)))


def test_an_adapter_is_a_fair_copy_after_tuning(fitted, tmp_path):
    shutil.copytree(fitted, tmp_path / "adapter")
    (tmp_path / "adapter" / "speed.json").write_text("{}")
    costs = CostTable.counted(6, head=0.3, unembedding=2.0)
    tune_adapter(tmp_path / "adapter", costs, Held(None, None, None))
    assert (tmp_path / "adapter" / "custom_generate" / "generate.py").is_file()
    assert not (tmp_path / "adapter" / "speed.json").exists()
    save_adapter(load_adapter(fitted), tmp_path / "bare")  # one that transformers cannot call
    assert not (tmp_path / "bare" / "custom_generate").exists()
