"""What lost workers cost a training, told when it happens and kept for the end of its stage."""

from flows.progress import say
from flows.stages import Context, Losses


def tell_loss(context: Context, stage: str, reason: str, workers: int = 1) -> None:
    """Say why ``stage`` starts something again; ``workers`` were lost, or 0 if something else holds it up."""
    before = context.losses.get(stage, Losses())
    context.losses[stage] = before._replace(workers=before.workers + workers)
    say(f"{stage}: {reason}")


def tell_delay(context: Context, stage: str, what: str, repeated: float, late: float) -> None:
    """Say ``what`` goes on after a loss: ``repeated`` seconds of its work are done again, and it is ``late`` by so many in all."""
    before = context.losses.get(stage, Losses())
    context.losses[stage] = before._replace(seconds=before.seconds + repeated)
    say(f"{stage}: {what}, about {repeated:.0f} s of work repeated, {late:.0f} s later than without the loss")
