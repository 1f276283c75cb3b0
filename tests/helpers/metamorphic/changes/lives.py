"""What happens to a model in its life: copies, adapters taken off and put on, answers in between."""

import copy
import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any

from runtime import SpeculationBounds, detach
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.metamorphic.answers import compare_answers
from tests.helpers.metamorphic.subject import Subject, drafter, speculative


def _copied(subject: Subject, copying: Callable[[Any], Any]) -> None:
    """Model and PEFT's wrapper together, where stock can be copied so."""
    specbound = subject.model.specbound
    detach(subject.model)
    try:
        copying(subject.model)
    except Exception:
        subject.nothing("stock cannot be copied so")
    finally:
        attach(subject.model, specbound)
    subject.lora, subject.model = copying((subject.lora, subject.model))
    subject.handles.clear()  # they are of the original


def deep_copy(subject: Subject) -> None:
    """The copy goes on in its place."""
    _copied(subject, copy.deepcopy)


def pickled(subject: Subject) -> None:
    """What comes back from a pickle goes on in its place."""
    _copied(subject, lambda value: pickle.loads(pickle.dumps(value)))


def detach_and_attach(subject: Subject) -> None:
    """The adapter taken off and put on."""
    specbound = subject.model.specbound
    attach(detach(subject.model), specbound)


def attach_anew(subject: Subject) -> None:
    """Another adapter in its place, which begins from nothing but the certificates on disk."""
    detach(subject.model)
    if len(subject.layers) == subject.model.config.num_hidden_layers:
        speculative(subject.model)
    else:
        attach(subject.model, SpecBound(subject.model, drafter(subject.model), SpeculationBounds(0.2, 1, 3)))


def answer(subject: Subject) -> None:
    """An answer in between."""
    compare_answers(subject)


def sampled_answer(subject: Subject) -> None:
    """A sampled one."""
    compare_answers(subject, do_sample=True)


def answer_in_a_thread(subject: Subject) -> None:
    """An answer from another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            compare_answers(subject)
        except BaseException as error:
            raised.append(error)

    worker = Thread(target=run)
    worker.start()
    worker.join()
    if raised:
        raise raised[0]


def interrupted_answer(subject: Subject) -> None:
    """A streamer raises in the middle of an answer."""
    compare_answers(subject, stop_after=subject.numbers.randint(2, 9))


def answer_on_a_prefix(subject: Subject) -> None:
    """The caller's cache holds the beginning of the prompt."""
    compare_answers(subject, prefix=3)


def beams(subject: Subject) -> None:
    """An answer that is never speculated."""
    compare_answers(subject, num_beams=2)


CHANGES = (
    deep_copy, pickled, detach_and_attach, attach_anew, answer, answer, answer, sampled_answer, answer_in_a_thread,
    interrupted_answer, answer_on_a_prefix, beams,
)  # fmt: skip
