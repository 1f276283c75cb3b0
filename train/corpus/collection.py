"""`Collection`: the conversations of some sources, and what was skipped of them. Knows no tokenizer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from tqdm import tqdm

from runtime.errors import DataError
from runtime.text.prompts import Prompt
from train.corpus.conversation import EXPECTED, Conversation, Unusable
from train.corpus.rows import read_rows
from train.settings.source import Source

logger = logging.getLogger(__name__)

NO_ANSWER = "no answer in it"
SILENT = 2.0  # seconds before a bar says that something is read


@dataclass(slots=True)
class Collection:
    """What sources hold.

    Attributes:
        conversations: in their order, duplicates included.
        rows: rows read.
        skipped: reason -> rows that could not be understood.
        first: reason -> where the first such row stands.
        columns: names of the columns of rows that could not be understood.
    """

    conversations: list[Conversation] = field(default_factory=list)
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts alone."""
        return [conversation.prompt for conversation in self.conversations]

    @classmethod
    def require(cls, texts: Sequence[str], *, limit: int | None = None, keep: bool = False) -> None:
        """Before anything that takes long: that each file is there, and holds a row that can be understood.

        Raises: see `read`.
        """
        for text in texts:
            if Source.parse(text).is_file:  # a data set may have to be downloaded
                cls.read(text, limit=limit, keep=keep, quiet=True, enough=1)

    @classmethod
    def read(
        cls,
        text: str,
        *,
        limit: int | None = None,
        keep: bool = False,
        quiet: bool = False,
        enough: int | None = None,
    ) -> "Collection":
        """Read one source; rows that cannot be understood are skipped, counted, and told in a logged line.

        Args:
            text: see `Source.parse`.
            limit: read at most this many rows, unless the source states a limit of its own.
            keep: answers are needed.
            quiet: log nothing.
            enough: stop after so many conversations.

        Raises:
            ConfigError: the source has a setting that is wrong.
            DataError: it cannot be read, or no row of it can be understood.
        """
        source, found = Source.parse(text), cls()
        rows = islice(read_rows(source), source.limit or limit)
        for where, row in tqdm(rows, f"read {source.path}", unit=" rows", delay=SILENT, leave=False):
            if len(found.conversations) == enough:
                break
            found.rows += 1
            try:
                found.conversations.append(_understood(row, source, keep=keep))
            except Unusable as error:
                found.skip(str(error), where)
                found.columns |= set(row) if isinstance(row, dict) else set()
        if not found.conversations:
            raise DataError(found._refusal(source))
        if found.skipped and not quiet:
            logger.warning("%s: %s", source.path, found.reasons())
        return found

    @classmethod
    def mix(
        cls, texts: Sequence[str], *, limit: int | None = None, keep: bool = False, quiet: bool = False
    ) -> "Collection":
        """Read several sources; of those with a weight, as many rows as keep their shares, evenly spaced.

        Raises: see `read`.
        """
        sources = [Source.parse(text) for text in texts]
        parts = [cls.read(text, limit=limit, keep=keep, quiet=quiet) for text in texts]
        weighted = [(part, one.weight) for part, one in zip(parts, sources, strict=True) if one.weight]
        whole = min((len(part.conversations) / weight for part, weight in weighted), default=0.0)
        for part, weight in weighted:
            number, available = max(1, round(whole * weight)), len(part.conversations)
            part.conversations = [part.conversations[index * available // number] for index in range(number)]
        mixed = cls()
        for part, source in zip(parts, sources, strict=True):
            mixed.conversations += part.conversations
            mixed.rows += part.rows
            for reason, number in part.skipped.items():
                mixed.skip(reason, f"{source.path}, {part.first[reason]}", number)
        return mixed

    def skip(self, reason: str, where: str, number: int = 1) -> None:
        """Count rows that cannot be used, the first of them at `where`."""
        self.skipped[reason] = self.skipped.get(reason, 0) + number
        self.first.setdefault(reason, where)

    def reasons(self) -> str:
        """Why rows were skipped, in words, the commonest reason first."""
        ordered = sorted(self.skipped.items(), key=lambda item: -item[1])
        each = [f"{number} {reason} (the first: {self.first[reason]})" for reason, number in ordered]
        return f"{sum(self.skipped.values())} of {self.rows} rows skipped: {'; '.join(each)}"

    def _refusal(self, source: Source) -> str:
        if not self.rows:
            return f"{source.path}: no prompts in it: it is empty; expected rows with {EXPECTED}"
        found = f"; found the columns {', '.join(sorted(self.columns))}" if self.columns else ""
        hint = ""
        if NO_ANSWER in self.skipped:
            hint = "; answers: keep needs answers (FILE?answer=NAME names their column), answers: distil does not"
        return f"{source.path}: no prompts in it: {self.reasons()}{found}; expected {EXPECTED}{hint}"


def _understood(row: object, source: Source, *, keep: bool) -> Conversation:
    if isinstance(row, Unusable):
        raise row
    read = Conversation.of(row, source)
    if not keep or read.whole:
        return read
    if not read.answers:
        raise Unusable(NO_ANSWER)
    later = read.prompt.later_turns[: len(read.answers) - 1]
    return Conversation(Prompt(read.prompt.messages, later, read.prompt.task), read.answers)
