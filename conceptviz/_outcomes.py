"""What became of each prompt of a batch. Pure: what is known goes in, an outcome for each comes out."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve

from ._batches import Batch
from ._errors import ConceptVizError, Credits, NotSentError, UnexpectedResponseError
from ._models import Outcome, Result


def outcomes_of(
    batch: Batch,
    results: Sequence[ConceptVizError | Outcome],
    task_id: str | None = None,
    credits_used: int | None = None,
) -> list[Outcome]:
    """Return the outcome of each prompt of a batch.

    Args:
        batch: The batch.
        results: What became of each of its prompts: an error, or an outcome that knows nothing but its image.
        task_id: Its task, or None if there is none.
        credits_used: What the task cost, or None if nobody knows.
    """
    outcomes = []
    for n, (prompt, result) in enumerate(zip(batch.request.prompts, results, strict=True)):
        # What does not divide evenly is on the first.
        share = None if credits_used is None else credits_used // batch.size + (n < credits_used % batch.size)
        if isinstance(result, ConceptVizError) and result.credits in {Credits.NOT_SPENT, Credits.REFUNDED}:
            share = 0
        outcomes.append(
            evolve(
                Outcome(0, "", error=result) if isinstance(result, ConceptVizError) else result,
                index=batch.index if batch.is_one_item else batch.index + n,
                prompt=prompt,
                key=batch.request.key,
                task_id=task_id,
                credits_used=share,
            )
        )
    return outcomes


def not_submitted(refusal: ConceptVizError) -> NotSentError:
    """Say that a prompt was not submitted, and why."""
    error = NotSentError(
        f"Not submitted, because an earlier submit was refused: {refusal} Nothing was spent on this one: submit it "
        "again when that is mended."
    )
    error.__cause__ = refusal
    return error


def no_image(result: Result) -> UnexpectedResponseError:
    """Say that no image came back for a prompt."""
    return UnexpectedResponseError(
        f"Task {result.task_id} is completed, but none of its {len(result.images)} images could be matched with this "
        "prompt. It is paid for; whether the missing image is refunded is not documented. Look at the task's images "
        f"with task({result.task_id!r}).wait(), or ask the service's support with this id.",
        status_code=200,
        body=b"",
        task_id=result.task_id,
        credits=Credits.SPENT,
    )
