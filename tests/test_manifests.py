"""What configs/serve/ says to Kubernetes and to Ray Serve: it fits this server, and their own schemas."""

import copy
import inspect
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import typer
import yaml

from runtime.cli.app import app
from runtime.server import replica
from runtime.server.request.limits import Limits
from runtime.server.serve import STOP_SECONDS
from tests.helpers.paths import ROOT

FOLDER = ROOT / "configs" / "serve"
VERBS: Any = typer.main.get_command(app)
# The oldest and the newest of Kubernetes that kubernetes-validate knows and that were looked at.
RELEASES = ("1.28", "1.36")


def objects() -> list[Any]:
    """Those of the manifest."""
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")))


def ray_config() -> dict[str, Any]:
    """What `serve run` reads."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / "ray.yaml").read_text(encoding="utf-8"))
    return found


def test_the_manifest_of_kubernetes() -> None:
    """Its command is one of ours, its labels, ports and memory fit one another, and its end is long enough."""
    deployment, service = objects()
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"][:2] == ["specbound", "serve"] and "args" not in container
    given = VERBS.commands["serve"].make_context("serve", container["command"][2:]).params
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    ports = {container["ports"][0]["containerPort"], container["readinessProbe"]["httpGet"]["port"]}
    assert ports == {service["spec"]["ports"][0]["targetPort"], given["port"]} == {given["port"]}
    memory = container["resources"]["limits"]["memory"]
    assert 0 < given["kv_memory"] < int(memory.removesuffix("Gi"))
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + given["grace"] + STOP_SECONDS < pod["spec"]["terminationGracePeriodSeconds"]
    assert container["env"][0]["name"] == "SPECBOUND_API_KEY"
    assert int(container["env"][1]["value"]) == given["threads"] == int(container["resources"]["limits"]["cpu"])


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_takes_the_manifest(release: str) -> None:
    """By the schemas of its API server, which know every field; negative control: a wrong one is found."""
    validator = pytest.importorskip("kubernetes_validate")
    for each in objects():
        validator.validate(copy.deepcopy(each), release, strict=True)
    deployment = objects()[0]
    deployment["spec"]["replica"] = 4
    with pytest.raises(validator.ValidationError, match="replica"):
        validator.validate(deployment, release, strict=True)


def test_the_application_of_ray() -> None:
    """Its arguments are those of a replica, threads and queue fit, and its end is long enough."""
    (application,) = ray_config()["applications"]
    module, _, name = application["import_path"].partition(":")
    assert module == replica.__name__ and inspect.isfunction(getattr(replica, name))
    given = dict(application["args"])
    known = inspect.signature(replica.Replica).parameters
    limits = {key: given.pop(key) for key in {field.name for field in fields(Limits)} & given.keys()}
    assert given.keys() <= known.keys() and (ROOT / given["adapter"]).is_dir()
    assert all(key in given for key, one in known.items() if one.default is one.empty and key != "limits")
    (deployment,) = application["deployments"]
    assert deployment["name"] == replica.Replica.__name__
    assert deployment["max_ongoing_requests"] == Limits(**limits).max_running
    assert deployment["autoscaling_config"]["target_ongoing_requests"] < deployment["max_ongoing_requests"]
    assert deployment["ray_actor_options"]["num_cpus"] == given["threads"]
    assert deployment["graceful_shutdown_timeout_s"] > STOP_SECONDS


def test_ray_takes_the_application() -> None:
    """By Ray Serve's own schema, which knows every field."""
    schema = pytest.importorskip("ray.serve.schema").ServeDeploySchema
    assert schema.model_validate(ray_config()).applications[0].name == "specbound"
    wrong = ray_config()
    wrong["applications"][0]["deployments"][0]["max_going"] = 1
    with pytest.raises(ValueError, match="max_going"):
        schema.model_validate(wrong)


def test_ray_is_asked_for() -> None:
    """Without it the error says what to install; the module itself needs none."""
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from runtime.server.replica import application\n"
        "try: application({})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "ConfigError ray is not installed: pip install 'ray[serve]>=2.60'\n"
