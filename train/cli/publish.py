"""`specbound publish`: upload an adapter to the Hub."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli.failure import fail


def publish_command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder. It is not changed.", show_default=False)],
    repo_id: Annotated[
        str,
        typer.Argument(
            metavar="ORG/NAME", help="The repository. It is created if it does not exist.", show_default=False
        ),
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Publish to a public repository. By default it is private.")
    ] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to. By default main.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag to set on the commit, such as v1.0.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base, if the adapter was fitted on a folder.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the base on the Hub.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the adapter, if its config names none.")] = None,
    bench: Annotated[
        Path | None, typer.Option(help="Report of `specbound bench`; adds its speeds to the card.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Publish an adapter to the Hub in one commit and verify it. If interrupted, run the same command again.

    Example: specbound publish outputs/demo/adapter my-org/smollm2-135m-specbound --license apache-2.0
    """
    from runtime.errors import SpecBoundError
    from runtime.files import naming
    from train.publishing.publish import publish
    from train.publishing.staging import Claims

    try:
        with naming(Path(tempfile.gettempdir())):  # where the copy is made
            published = publish(
                adapter,
                repo_id,
                private=not public,
                create_pr=create_pr,
                revision=revision,
                tag=tag,
                claims=Claims(base_model, base_revision, license, bench),
            )
    except (SpecBoundError, OSError) as error:
        fail(error, {"adapter": str(adapter), "repo_id": repo_id} if as_json else None)
    if as_json:
        print(json.dumps({"repo_id": repo_id, **asdict(published)}))
        return
    unchanged = "" if published.changed else ", as it was: nothing to do"
    print(f"{published.url} commit {published.commit[:12]}{unchanged}")
