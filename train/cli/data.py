"""`specbound data`: look at prompts and answers before they are fitted on. Slow libraries are imported inside."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.failure import fail

ROLES = {"system": "magenta", "developer": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
SHOWN = 600  # characters of a message in an example


def data_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Files or data sets, as a recipe's prompts list them.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A recipe: all that is not given here is taken from it, its prompts too.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, for its tokenizer.")] = None,
    answers: Annotated[str | None, typer.Option(help="Look at them as a fit would: distil or keep.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many rows of each source.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="The fit skips longer ones; 1024.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The fit cuts longer answers; 128.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="The tokenizer's (auto) or plain text (none).")] = None,
    calibration_fraction: Annotated[float | None, typer.Option(min=0, max=1, help="Of the prompts; 0.1.")] = None,
    held_out_fraction: Annotated[float | None, typer.Option(min=0, max=1, help="Of the prompts; 0.1.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Show this many conversations.")] = 2,
    picture: Annotated[Path | None, typer.Option(help="Draw the lengths into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a fit would make of a file: rows, turns, lengths in tokens, what is skipped and why, and examples.

    Example: specbound data configs/data/demo_prompts.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from runtime.errors import SpecBoundError
    from train.corpus.prompts import special_tokens
    from train.planning.histogram import histogram

    source = {"prompts": sources, "model_name_or_path": model, "answers": answers, "prompt_limit": limit}
    changes: dict[str, Any] = {
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "chat_template": chat_template,
    }
    changes |= {"calibration_fraction": calibration_fraction, "held_out_fraction": held_out_fraction}
    try:
        options, tokenizer, survey = _survey(config, source, _given(changes), examples)
        if picture is not None:
            histogram(survey, options, picture)
            print(f"picture: {picture}")
    except (SpecBoundError, OSError) as error:
        fail(error, {"sources": sources} if as_json else None)
    if as_json:
        print(json.dumps(survey.as_json(), indent=2))
    else:
        show(survey, options, special_tokens(tokenizer))


def _survey(
    recipe: Path | None, source: dict[str, Any], changes: dict[str, Any], examples: int
) -> tuple[Any, Any, Any]:
    """The options of the corpus, the tokenizer, and what is found; raises a SpecBoundError where it cannot be."""
    from runtime.base import find_base, load_tokenizer
    from runtime.errors import ConfigError
    from train.corpus.answers import check_template
    from train.corpus.collection import Collection
    from train.corpus.options import CorpusOptions
    from train.planning.survey import Survey
    from train.settings.fit_config import parse_config

    options, chosen = CorpusOptions(**changes), {"answers": "distil", "model_revision": None, **source}
    if recipe is not None:
        config = parse_config(["--config", str(recipe)])
        options, chosen = CorpusOptions.of(config, **changes), vars(config) | _given(source)
    for name, missing in (("prompts", "no prompts: give a file"), ("model_name_or_path", "no base: give --model")):
        if not chosen[name]:
            raise ConfigError(f"{missing}, or a recipe with --config")
    keep = (chosen["answers"] or "distil") == "keep"
    if chosen["answers"] not in (None, "distil", "keep"):
        raise ConfigError(f"answers {chosen['answers']!r}: expected distil or keep")
    Collection.require(chosen["prompts"], limit=chosen["prompt_limit"], keep=keep)
    tokenizer = load_tokenizer(find_base(chosen["model_name_or_path"]), {"revision": chosen["model_revision"]})
    check_template(tokenizer, options)
    read = Collection.mix(chosen["prompts"], limit=chosen["prompt_limit"], keep=keep, quiet=True)
    return options, tokenizer, Survey.of(read, tokenizer, options, keep=keep, num_examples=examples)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Those that the command line says."""
    return {name: value for name, value in values.items() if value not in (None, [])}


def show(survey: Any, options: Any, special: list[str]) -> None:
    """Print the figures as tables and the examples in colour."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(survey, options):
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    lengths = Table("tokens of", "all", "mean", "least", "10 %", "median", "90 %", "99 %", "most", box=None)
    for name, numbers in (("prompts", survey.as_json()["prompts"]), ("answers", survey.as_json()["answers"])):
        if numbers is not None:
            lengths.add_row(name, *(f"{value:,.0f}" for value in numbers.values()))
    console.print(lengths)
    if survey.empty:
        console.print(Text(survey.empty, style="bold red"))
    for example, rendered in zip(survey.examples, survey.rendered, strict=True):
        said = Text()
        for role, content in _messages(example):
            said.append(f"{role}: ", style=f"bold {ROLES[role]}").append(content[:SHOWN], style=ROLES[role])
            said.append(" ...\n" if len(content) > SHOWN else "\n")
        said.highlight_words(special, "bold red reverse")
        said.rstrip()
        console.print(Panel(said, border_style="dim"))
        whole = Text(rendered if len(rendered) <= 2 * SHOWN else f"{rendered[:SHOWN]} ... {rendered[-SHOWN:]}")
        whole.highlight_words(special, "bold red reverse")
        console.print(Panel(whole, title="as the base reads it", title_align="left", border_style="dim"))


def _facts(survey: Any, options: Any) -> list[tuple[str, str]]:
    """The figures that are not lengths, in words."""
    turns = ", ".join(f"{number:,} with {turns}" for turns, number in survey.turns.items())
    splits = ", ".join(f"{name} {number:,}" for name, number in sorted(survey.splits.items()))
    skipped = [f"{number:,} {reason} (first: {survey.first[reason]})" for reason, number in survey.skipped.items()]
    facts = [
        ("rows", f"{survey.rows:,}"),
        ("skipped", "; ".join(skipped) or "none"),
        ("conversations", f"{survey.conversations:,}, {survey.systems:,} with a system's message"),
        ("duplicates", f"{survey.duplicates:,}"),
        ("turns", f"{turns}; by split: {splits}"),
        ("too long", f"{survey.too_long:,} prompts above max_prompt_tokens {options.max_prompt_tokens}: skipped"),
    ]
    if survey.answers:
        facts.append(("cut", f"{survey.cut:,} of {len(survey.answers):,} answers above max_new_tokens"))
    for kind, special in (("prompts", survey.special), ("answers", survey.special_answers)):
        if special:
            told = ", ".join(f"{token} in {number:,}" for token, number in special.items())
            cut = ", where an answer may end" if kind == "answers" else ""
            facts.append((f"tokens in {kind}", f"special ones in the text, which become real ones{cut}: {told}"))
    return facts


def _messages(example: Any) -> list[tuple[str, str]]:
    """Role and text of everything that was said in a conversation, in order."""
    said = [(message.role, message.content) for message in example.prompt.messages]
    answers, later = list(example.answers), list(example.prompt.later_turns)
    while answers or later:
        said += [("assistant", answers.pop(0))] if answers else []
        said += [("user", later.pop(0))] if later else []
    return said
