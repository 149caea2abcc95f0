"""The random numbers of sampling, which no two calls of a process may share.

They come from the process-wide generator, as plain generate's do, and other threads draw from it
at any time, knowing no lock of ours. Only a draw is one step that nobody gets between, since it
holds the generator's own mutex; reading its state and setting it later is not. So the generator
is drawn from and never set: it only goes forward, and whoever draws next gets numbers that nobody
had. What is wanted ahead of time comes from a copy of it, as a forecast. A forecast may choose a
draft, which decides nothing; before it decides a token the same numbers have been drawn in
earnest.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Noise:
    """A call's random numbers, drawn as plain generate draws them, and foreseen before that.

    ``torch.multinomial(p, 1)`` is ``argmax(p / q)`` with one draw of q ~ Exp(1) like p
    (aten/src/ATen/native/Distributions.cpp), which plain generate calls once a step for all rows.
    So does this, in step order; row b's token of step t divides by row b of the t-th draw,
    whichever round chooses it. A draft that divides by the q of its own step chooses the token
    that verification will choose, wherever draft and dense model agree well enough
    (drafter-invariant sampling, Daliri et al. 2024, arXiv 2408.07978).

    As long as nobody else draws, each step is drawn once it is known to be needed, and the
    generator is where plain generate has it. Once somebody does, there is no order left to keep:
    from then on steps are drawn ahead of need, and what is not needed in the end goes unused.

    Args:
        batch, vocabulary: of a step's draw.
        window: draws kept at a time, so that memory does not grow with the distance between rows.

    Attributes:
        drawn, foreseen: steps whose draws are the call's own, and that it has or guesses.
        alone: whether nobody else has been seen to draw.
    """

    def __init__(self, batch: int, vocabulary: int, window: int, device: torch.device):
        self.generator = default_generator(device)
        self.forecast = torch.Generator(self.generator.device)
        self.window = window
        self.drawn = self.foreseen = 0
        self.states: dict[int, Tensor] = {}  # that the generator should have after so many steps
        self.alone = True
        # As the probabilities are, whatever torch.set_default_dtype says.
        self.ring = torch.empty(window, batch, vocabulary, dtype=torch.float32, device=device)
        self.rows = torch.arange(batch, device=device)

    def foresee(self, until: int) -> None:
        """Have draws or guesses of the steps before `until`, over those of `window` earlier."""
        if not self.alone:
            self.draw(until)
            return
        for step in range(max(self.foreseen, self.drawn), until):
            if step == self.drawn:
                self.forecast.set_state(self.generator.get_state())
            self.ring[step % self.window].exponential_(1, generator=self.forecast)
            self.states[step + 1] = self.forecast.get_state()
            self.foreseen = step + 1

    def draw(self, until: int) -> bool:
        """Draw the steps before `until`, which are sure to be needed if the call is `alone`.

        Returns:
            Whether these are the numbers that were foreseen. If not, there are none yet of steps
            beyond `drawn`.
        """
        before = self.drawn
        for step in range(before, until):
            self.ring[step % self.window].exponential_(1, generator=self.generator)
            self.drawn = step + 1
        if not self.alone or self.drawn == before or self.foreseen <= before:
            return True
        # Draws only move a state on, so this one is reached by these draws alone.
        foreseen = self.states.get(self.drawn)
        self.alone = foreseen is not None and torch.equal(foreseen, self.generator.get_state())
        self.states = {s: state for s, state in self.states.items() if s > self.drawn}
        return self.alone

    def at(self, steps: Tensor) -> Tensor:
        """Each row's draws of its own steps ``[B]`` or ``[B, T]``; of steps without one, any."""
        return self.ring[steps % self.window, self.rows.view(-1, *[1] * (steps.dim() - 1))]


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that ``torch.multinomial`` draws from on `device`, CPU or CUDA."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def upcoming_noise(probabilities: Tensor, steps: int) -> list[Tensor]:
    """What `Noise` draws, of the next `steps` steps, without drawing it.

    Generate draws these numbers itself, so any other user of the generator (a processor of the
    caller's own, say) sees no difference. If another thread draws first, generate gets other
    numbers, and the drafts chosen by these are rejected.
    """
    device = probabilities.device
    if device.type not in ("cpu", "cuda"):
        # A generator that cannot be copied must not be drawn from.
        return [torch.ones_like(probabilities)] * steps
    forecast = torch.Generator(default_generator(device).device)
    forecast.set_state(default_generator(device).get_state())
    like = torch.empty_like
    return [like(probabilities).exponential_(1, generator=forecast) for _ in range(steps)]
