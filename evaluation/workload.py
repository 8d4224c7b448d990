"""What the benchmark times: passes, steps, images and training updates, as calls by name.

Shapes: B batch, Z latent channels, H and W sides of the latent, L tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ppdd
from evaluation import timing
from evaluation.baseline import BASELINE, baseline_functions
from support import fast
from support.base import Base
from support.capture import Captured
from support.machine import math_attention
from unet import UNet

G = 8.0
PROMPT = "a lighthouse on a cliff at sunset, oil painting"
METHODS = ("CFG", "full", "tiny", "seeing")
PASSES = ("UNet pass", "VAE decode", "text encoding")


class Models(NamedTuple):
    """Everything that is measured."""

    base: Base
    guides: dict[str, nn.Module]
    pipe: object                        # the baseline, or None
    plain: dict[str, nn.Module]         # the same tensors, to train and compile: not prepacked


class Work:
    """The work at one side of the latents and one batch, as calls by name."""

    def __init__(self, config, models: Models, side: int, batch: int):
        self.config, self.models, self.side, self.batch = config, models, side, batch
        self.base, self.guides, self.pipe, self.plain = models
        self.prompts = [PROMPT] * batch
        self.record = partial(timing.recorded, device=config.device)
        step = fast.predict_step
        self.step = Captured(step) if timing.is_gpu(config.device) else step

    @cached_property
    def z(self) -> Tensor:                                                     # (B, Z, H, W)
        shape = (self.base.unet.config.in_channels, self.side, self.side)
        return ppdd.noise(range(self.batch), shape).to(self.config.device)

    @cached_property
    def t(self) -> Tensor:                                                     # (B,)
        return torch.full((self.batch,), 500, device=self.config.device)

    @cached_property
    def ids(self) -> Tensor:                                                   # (B, L)
        return self.base.tokenizer(self.prompts).to(self.config.device)

    @cached_property
    def c(self) -> Tensor:                                                     # (B, L, D)
        return self.base.text(self.ids)

    @cached_property
    def empty(self) -> Tensor:                                                 # (B, L, D)
        return self.base.embed([""]).expand_as(self.c)

    # -- passes

    def calls_of(self, unet: Callable, decode: Callable, text: Callable) -> dict[str, Callable]:
        """The three passes on our inputs."""
        z = self.z.to(self.c.dtype)
        return {"UNet pass": partial(unet, z, self.t, self.c), "VAE decode": partial(decode, z),
                "text encoding": partial(text, self.ids)}

    def calls_of_ours(self) -> dict[str, Callable]:
        return self.calls_of(self.base.unet, self.base.vae.decode, self.base.text)

    def calls_of_baseline(self) -> dict[str, Callable]:
        return self.calls_of(*baseline_functions(self.pipe)) if self.pipe else {}

    def passes(self, name: str) -> dict[str, Callable]:
        """One of PASSES, ours and the baseline's; on a GPU also recorded."""
        calls = {name: self.calls_of_ours()[name]}
        if self.pipe:
            calls[BASELINE + name] = self.calls_of_baseline()[name]
        if timing.is_gpu(self.config.device):
            calls |= {f"{key}, captured": self.record(call) for key, call in calls.items()}
        return calls

    def growth(self) -> dict[str, Callable]:
        calls = self.passes("UNet pass")
        return {name: call for name, call in calls.items() if name.endswith(", captured")}

    def compiled_pass(self, name: str) -> dict[str, Callable]:
        """One of PASSES, compiled, and on a GPU recorded."""
        torch.compiler.reset()                          # other shapes are compiled anew
        networks = {"": (self.plain["unet"], self.plain["vae"].decode, self.plain["text"])}
        if self.pipe:
            networks[BASELINE] = baseline_functions(self.pipe)
        return {f"{who}{name}, compiled":
                self.record(self.calls_of(*map(fast.compile_step, functions))[name])
                for who, functions in networks.items()}

    # -- steps and images

    def sample(self, step: Callable, method: str, steps: int, c: Tensor, empty: Tensor,
               models: dict[str, nn.Module] | None = None) -> Tensor:
        """Latents of one of METHODS. models: where the networks are, by default the prepacked."""
        models = models or {"unet": self.base.unet} | self.guides
        z = fast.sample(models["unet"], self.z, c, G, steps, models.get(method),
                        empty if method == "CFG" else None, step=step)
        if isinstance(step, Captured) and None in step.recordings.values():
            raise RuntimeError("the step can't be recorded as a CUDA graph")
        return z

    def run_of_steps(self, step: Callable, method: str,
                     models: dict[str, nn.Module] | None = None) -> Callable:
        """A run of a few steps, as part of their work precedes the first."""
        n = timing.steps_per_run(self.config.device)
        return partial(self.sample, step, method, n, self.c, self.empty, models)

    def steps(self) -> dict[str, Callable]:
        calls = {}
        if not isinstance(self.step, Captured) or self.batch == self.config.batch[0]:
            calls |= {f"{method} step": self.run_of_steps(fast.predict_step, method)
                      for method in METHODS}
        if isinstance(self.step, Captured):
            calls |= {f"{method} step, captured": self.run_of_steps(self.step, method)
                      for method in METHODS}
        return calls

    def compiled_step(self, name: str) -> dict[str, Callable]:
        torch.compiler.reset()
        step = fast.compile_step(fast.predict_step)
        if timing.is_gpu(self.config.device):
            step = Captured(step)
        return {f"{name}, compiled": self.run_of_steps(step, name.split()[0], self.plain)}

    def images(self, steps: int) -> dict[str, Callable]:
        """Images from prompt to pixels: text encoder, sampling, VAE."""
        calls = {f"{method} image, {steps} steps": partial(self.image, method, steps)
                 for method in METHODS}
        if self.pipe:
            calls[f"{BASELINE}CFG image, {steps} steps"] = partial(self.baseline_image, steps)
        return calls

    def image(self, method: str, steps: int) -> Tensor:
        c = self.base.embed(self.prompts)
        empty = self.base.embed([""]).expand_as(c) if method == "CFG" else c
        return self.base.decode(self.sample(self.step, method, steps, c, empty))

    def baseline_image(self, steps: int, output: str = "pt") -> Tensor:
        """Images, or latents, of diffusers' StableDiffusionPipeline with CFG."""
        empty = self.base.tokenizer([""]).to(self.ids.device)
        c, empty = (self.pipe.text_encoder(ids).last_hidden_state for ids in (self.ids, empty))
        return self.pipe(prompt_embeds=c, negative_prompt_embeds=empty.expand_as(c),
                         num_inference_steps=steps, guidance_scale=1 + G,
                         latents=self.z.to(c.dtype), height=8 * self.side, width=8 * self.side,
                         output_type=output).images

    # -- training

    def updates(self, name: str, stage: str) -> dict[str, Callable]:
        """One update of a guide, AdamW and all, as train.py makes it; of stage one also the naive
        way. The base is frozen in its dtype, the guide's own weights are float32."""
        unet, teacher, dtype = self.plain["unet"], self.plain[name], self.c.dtype
        guide = copy.deepcopy(teacher).float().requires_grad_()
        run_guide = guide if dtype == torch.float32 else partial(cast_and_run, guide, dtype)
        on_gpu = self.z.is_cuda
        options = {"lr": torch.full((), 1e-4, device=self.z.device), "capturable": on_gpu}
        optimizer = torch.optim.AdamW(guide.parameters(), weight_decay=0.0, **options)
        g = torch.full_like(self.t, G, dtype=torch.float)
        t, t_mid, t_end = (torch.full_like(self.t, t) for t in ppdd.step_grid(16)[4:7])
        inputs = (unet, run_guide, self.z, t, self.c, self.empty, g)
        losses = {"stage-one update": lambda: ppdd.cfg_distillation(*inputs).loss,
                  "stage-one update, naive": lambda: naive_loss(*inputs),
                  "halving update": lambda: ppdd.halving(unet, run_guide, teacher, self.z, t,
                                                         t_mid, t_end, self.c, g).loss}
        return {f"{name} {kind}": timing.recorded_update(partial(self.update, loss, optimizer),
                                                         self.config.device)
                for kind, loss in losses.items() if kind.startswith(stage)}

    def update(self, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        with math_attention(self.z.device):
            optimizer.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        return value.detach()


def cast_and_run(guide: nn.Module, dtype: torch.dtype, *args: Tensor) -> list[Tensor]:
    weights = {k: p.to(dtype) for k, p in guide.named_parameters()}
    return torch.func.functional_call(guide, weights, args)


def naive_loss(unet: UNet, guide: Callable, z: Tensor, t: Tensor, c: Tensor, empty: Tensor,
               g: Tensor) -> Tensor:
    """Algorithm 1 without sharing: a teacher's batch of two, then a whole pass of the student."""
    with torch.no_grad():
        both = torch.cat([c, empty])
        emb = unet.embed_time(torch.cat([t, t]))
        eps = unet.decode(unet.encode(torch.cat([z, z]), emb, both), emb, both).float()
        e_teacher = ppdd.cfg(*eps.chunk(2), g)
        emb = unet.embed_time(t)
    features = unet.encode(z, emb, c)
    e = unet.decode(features, emb, c, guide(g, emb, c, z, t, features)).float()
    return (e - e_teacher).square().mean()
