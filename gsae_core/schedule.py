"""What keeps a run from the learning rate, the lambda and the revivals that its recipe asks for."""

from gsae_core.config import RunConfig, TrainRecipe


def shortfalls_of_run(config: RunConfig) -> list[str]:
    """Return `shortfalls` of a run that learns here; an imported one's recipe says nothing."""
    return [] if config.imported is not None else shortfalls(config.train)


def shortfalls(recipe: TrainRecipe) -> list[str]:
    """Return a sentence for each thing that a recipe asks for and its length does not allow."""
    n = recipe.n_steps
    warmup, lambda_warmup, every, window = recipe.schedule
    decay = recipe.lr_decay_fraction * n
    # The step after which dead latents are last revived; 0 if they never are.
    last = int(recipe.revive_until * n) // every * every if every else 0
    told = []
    if warmup >= n:
        told.append(
            f"all {n:,} steps lie within the learning-rate warm-up of {warmup:,}, so the learning "
            "rate never reaches its peak; shorten the warm-up or train on more tokens"
        )
    elif warmup > n - decay:
        told.append(
            f"the learning rate warms up over {warmup:,} steps and falls over the last {decay:,.0f}"
            f" of {n:,}, so it never reaches its peak; shorten the warm-up or the decay"
        )
    elif last and warmup >= every:
        up = last + warmup
        until = "to the end" if up > n - decay else f"until step {up:,} of {n:,}"
        told.append(
            f"each revival that finds dead features begins a warm-up of {warmup:,} steps and the "
            f"next revival comes after {every:,}; if all find some, the learning rate stays below "
            f"its peak {until}; shorten the warm-up or revive less often"
        )
    elif last and warmup > n - decay - last:
        falls = f" and a decay over the last {decay:,.0f}" if decay else ""
        told.append(
            f"the last revival of dead features, after step {last:,} of {n:,}, leaves too few "
            f"steps for its warm-up of {warmup:,}{falls}, so what it revives never learns at the "
            "peak learning rate; shorten the warm-up or end revivals earlier"
        )
    if lambda_warmup >= n:
        told.append(
            f"lambda rises over {lambda_warmup:,} steps and there are {n:,}, so it never reaches "
            "what was asked for; shorten its warm-up or train on more tokens"
        )
    if every and recipe.revive_until > 0 and not last:
        told.append(
            f"no dead feature is revived: the first revival would come after step {every:,}, and "
            f"none comes after step {int(recipe.revive_until * n):,} of {n:,}; revive more often "
            "or train on more tokens"
        )
    elif last and window > last:
        told.append(
            f"no dead feature is revived: a feature is dead after {window:,} steps in which it did "
            f"not fire, and the last revival comes after step {last:,}; call features dead sooner "
            "or train on more tokens"
        )
    return told
