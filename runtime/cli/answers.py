"""`specbound generate --file`: answer a file of prompts, several at once, and go on where a run before was cut."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from runtime.batch import Batch, Call
from runtime.batch.texts import join, outcome
from runtime.cli.speaker import Speaker
from runtime.errors import ConfigError, DataError
from runtime.files import check_writable, write_atomic
from runtime.text.prompts import Prompt, read_prompts
from runtime.text.transcript import Transcript

BEGINS = b'{"index": '  # a line of the output


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts of a file, and where the answers go.

    Attributes:
        done: places of the prompts that the output has answers of.
    """

    source: str
    prompts: list[Prompt]
    output: Path
    done: set[int]

    @classmethod
    def read(cls, source: str, output: Path) -> "Asked":
        """Read both files; no model is needed to see what is wrong with them.

        Raises:
            DataError: the file holds no prompts, or one of several turns; the output is of other prompts.
            ConfigError: the output cannot be written.
        """
        prompts = read_prompts(source)
        for number, prompt in enumerate(prompts, start=1):
            if prompt.later_turns:
                raise DataError(f"{source}, prompt {number}: has several turns; give each conversation as `messages`")
        done = answered(output, prompts)
        if not output.exists():
            check_writable(output)
        return cls(source, prompts, output, done)


def answer_file(
    speaker: Speaker, asked: Asked, *, concurrency: int, raw: bool, max_new_tokens: int, **ask: Any
) -> None:
    """Answer the prompts of a file; each line of the output is one answer, as soon as it is there.

    When all are there the lines are put in the order of the prompts. Prompts that are answered in the output already
    are left out. Where a seed is given, each prompt's is that plus its place in the file.

    Args:
        ask: `seed`, `stop` and options of `generate`.

    Raises:
        DataError: a prompt is too long.
        ConfigError: the output cannot be written.
    """
    prompts, output, done = asked.prompts, asked.output, asked.done
    left = [number for number in range(len(prompts)) if number not in done]
    ids = {number: _encoded(speaker, prompts[number], f"{asked.source}, prompt {number + 1}", raw) for number in left}
    seed, stop = ask.pop("seed"), ask.pop("stop")
    try:
        file = output.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror})") from error
    with file, Batch(speaker.model, concurrency) as batch, tqdm(total=len(prompts), initial=len(done)) as bar:
        under_way: dict[Call, tuple[int, Transcript]] = {}
        for number in left:
            transcript, prompt = Transcript(speaker.tokenizer, stop=stop), ids[number]
            limit = min(max_new_tokens, speaker.context - prompt.shape[1])
            own = None if seed is None else seed + number
            under_way[join(batch, prompt, transcript, seed=own, max_new_tokens=limit, **ask)] = number, transcript
        while under_way:
            for call in batch.round():
                number, transcript = under_way.pop(call)
                if call.error is not None:
                    raise call.error
                written = outcome(batch, call, transcript)
                row = {"index": number, "prompt": prompts[number].hash, "text": transcript.text}
                row |= {"tokens": transcript.ids, "finish_reason": written.finish_reason}
                file.write(json.dumps(row) + "\n")
                file.flush()
                bar.update()
        os.fsync(file.fileno())
    if output.is_file():  # and no pipe
        lines = output.read_bytes().splitlines(keepends=True)
        lines.sort(key=lambda line: int(json.loads(line)["index"]))
        write_atomic(output.resolve(), b"".join(lines))
    print(f"{len(left)} answers added to {output}")


def answered(output: Path, prompts: list[Prompt]) -> set[int]:
    """Places of the prompts that an output has answers of; a last line that was cut is taken away.

    Raises:
        DataError: it is of other prompts, or something else.
    """
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done = set()
    for line in whole.splitlines():
        try:
            row = json.loads(line)
            number, of = row["index"], row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{output}: holds something else than answers; name another file") from error
        if not (isinstance(number, int) and 0 <= number < len(prompts) and prompts[number].hash == of):
            raise DataError(f"{output}: holds answers to other prompts; name another file")
        done.add(number)
    if len(whole) < len(data):
        cut = data[len(whole) :]
        if cut[: len(BEGINS)] != BEGINS[: len(cut)]:
            raise DataError(f"{output}: holds something else than answers; name another file")
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _encoded(speaker: Speaker, prompt: Prompt, where: str, raw: bool) -> Any:
    """Its ids [1, T]."""
    try:
        return speaker.encode([(message.role, message.content) for message in prompt.messages], raw=raw)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
