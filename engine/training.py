"""Training: one learner, its step, and its state on disk; train.py gives it cases.

Where the recipe of Zhu et al. lies: `learn` takes one volume a step (section 3.1); `_new_optimiser` and `rate_at` are
the two stages (3.1); engine/losses.py is the hybrid loss and its masks (2.3, 2.4); engine/network.py the network (2.2).
"""

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from anatomynet.engine.augmentation import Sample
from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig, TrainConfig, model_config_from_json
from anatomynet.engine.errors import DataError, ModelError
from anatomynet.engine.losses import hybrid_loss
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.output import write_whole
from anatomynet.engine.precision import in_bfloat16

LARGEST_GRADIENT = 12.0
MOMENTUM = 0.9  # of the paper's second stage (section 3.1)
MAY_CHANGE = ("steps", "steps_per_epoch")  # when a run is resumed
NOT_VALIDATED = -1.0  # below the worst DSC: the first validation always writes a checkpoint
CASES_TOLD = 3  # by name, of those that are other ones
FINAL_RATE = 0.01  # share of the learning rate that is left at the end

CaseDigests = dict[str, dict[str, str]]  # folder -> case -> a digest of all that is learnt from it


class Training:
    """Everything that a training run changes, and that a resumed run must find again.

    Args:
        model: what is learnt.
        train: how.
        device: where.
        new_network: makes the network of so many classes: another one may learn by the same recipe, to be compared.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        device: torch.device,
        *,
        new_network: Callable[[int], nn.Module] = AnatomyNet,
    ) -> None:
        torch.manual_seed(train.seed)
        self.model = model
        self.train = train
        self.device = device
        self.network = _channels_last(new_network(model.classes).to(device))
        self.average = _channels_last(new_network(model.classes).to(device)).eval()
        self.average.load_state_dict(self.network.state_dict())
        self._floats, self._counts = _followed(self.average, self.network)
        self._set_frozen: bool | None = None  # as the network's modules are
        self._recorded: dict[tuple[bool, tuple[int, ...]], nn.Module] = {}  # by whether statistics are frozen, and size
        self.step = 0
        self.losses: list[Tensor] = []  # of the epoch's steps so far, on the device
        self.optimiser = self._new_optimiser()
        self.best = NOT_VALIDATED  # DSC
        self.digests: CaseDigests = {}  # of what is learnt from and validated with; none where nobody told

    def begin_with(self, path: Path | None) -> None:
        """Takes the weights of a checkpoint instead of random ones; None is the shipped one.

        A structure then counts as taught by as many patients as here or there, whichever are more: how many are the
        same is not known.

        Raises:
            ModelError: no checkpoint there, or one that draws other structures, at another stride, window or spacing.
        """
        network, model = load_checkpoint(path)
        alike = dataclasses.replace(self.model, name=model.name, checkpoint_sha256=model.checkpoint_sha256)
        if not _same_but_patients(model, alike):
            raise ModelError(
                f"{path or model.name} was trained for {', '.join(model.structures)} at in_plane_stride "
                f"{model.in_plane_stride}: expected the [model] of {self.model.name}, its window and spacing included"
            )
        for own in (self.network, self.average):
            own.load_state_dict(network.state_dict())
        self.count_patients(model.patients)

    def take_cases(self, digests: CaseDigests, *, archive: Path) -> None:
        """Notes which cases an archive holds to learn from and to validate with; the state tells them from then on.

        Raises:
            DataError: they are not those that a resumed run was begun with: what it learnt from might validate it.
        """
        if self.digests and (told := "; ".join(_differences(self.digests, digests))):
            raise DataError(
                f"{archive} holds other cases than the run was begun with ({told}): put those back, or start a new "
                "output, which --from may begin with these weights"
            )
        self.digests = digests

    def count_patients(self, patients: Iterable[int]) -> None:
        """Takes in how many patients have each structure's contours; of several counts the largest."""
        pairs = itertools.zip_longest(self.model.patients, patients, fillvalue=0)
        self.model = dataclasses.replace(self.model, patients=tuple(max(pair) for pair in pairs))

    def learn(self, sample: Sample) -> Tensor:
        """One optimiser step on one volume; returns the loss, a scalar on the device: a GPU is not waited for."""
        if self.step == second_stage_start(self.train):
            self.optimiser = self._new_optimiser()
        for group in self.optimiser.param_groups:
            group["lr"] = rate_at(self.step, self.train)
        self._set_mode()
        image = sample.image.to(self.device, memory_format=torch.channels_last_3d)
        loss = hybrid_loss(
            self._forward(image)(image),
            sample.target.to(self.device),
            sample.annotated,
            class_weights=self.train.class_weights,
            focal_weight=self.train.focal_weight,
            focal_gamma=self.train.focal_gamma,
            missing=self.train.missing,
        )
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.step += 1
        self._follow()
        return loss.detach()

    def _forward(self, image: Tensor) -> nn.Module:
        """What makes logits of this image: on a GPU a recording of it for the sizes that come again and again.

        The network's thousand small kernels take a GPU less time than Python takes to name them.
        """
        plain = _InPrecision(self.network, self.device, self.train.precision)
        size = tuple(image.shape[2:])
        if self.device.type != "cuda" or size not in _recorded_sizes(self.train):
            return plain
        key = (self._statistics_are_frozen, size)
        if key not in self._recorded:
            before = {name: value.clone() for name, value in self.network.state_dict().items()}
            # The trials before a recording move the statistics. PyTorch 2.11 warns, in a page of text, that a second
            # recording waits for the stream of the first. This is harmless: oar9 was trained on phantoms that way.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
                self._recorded[key] = cast(nn.Module, torch.cuda.make_graphed_callables(plain, (image.clone(),)))
            self.network.load_state_dict(before)
        return self._recorded[key]

    @property
    def validated(self) -> bool:
        """Whether there is a best checkpoint by now."""
        return self.best > NOT_VALIDATED

    @property
    def _statistics_are_frozen(self) -> bool:
        return self.step >= frozen_from(self.train)

    def _new_optimiser(self) -> torch.optim.Optimizer:
        """That of the stage which the step lies in, without a memory."""
        weights, train = self.network.parameters(), self.train
        if train.optimiser == "adamw":
            fused = self.device.type == "cuda"
            return torch.optim.AdamW(weights, lr=train.learning_rate, weight_decay=train.weight_decay, fused=fused)
        if self.step < second_stage_start(train):
            return torch.optim.RMSprop(weights, lr=train.learning_rate, weight_decay=train.weight_decay)
        return torch.optim.SGD(weights, lr=train.second_rate, momentum=MOMENTUM, weight_decay=train.weight_decay)

    def _set_mode(self) -> None:
        """Training mode; late in the run the normalisation keeps the averaged statistics, those that will serve.

        With one volume a batch, a layer that normalises by the batch sees each volume by its own statistics, which the
        served network does not have. What freezing gains has not been measured by itself.
        """
        if self.step == frozen_from(self.train):
            self.network.load_state_dict(self.average.state_dict())
        frozen = self._statistics_are_frozen
        if frozen != self._set_frozen:  # asking every module takes longer than many a kernel
            self.network.train()
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.train(not frozen)
            self._set_frozen = frozen

    def save(self, path: Path) -> None:
        """Writes the state, whole or not at all; `restore` reads it.

        Raises:
            OutputError: it could not be written.
        """
        tensors: dict[str, Tensor] = {}
        for prefix, network in (("network", self.network), ("average", self.average)):
            tensors |= {f"{prefix}.{k}": v.detach().contiguous().cpu() for k, v in network.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v.contiguous().cpu() for k, v in moments.items()}
        train = json.dumps(dataclasses.asdict(self.train), sort_keys=True)
        metadata = {"model": self.model.to_json(), "train": train, "step": str(self.step), "best": repr(self.best)}
        metadata["losses"] = json.dumps([float(loss) for loss in self.losses])
        if self.digests:
            metadata["cases"] = json.dumps(self.digests, sort_keys=True)
        write_whole(path, save(tensors, metadata=metadata), overwrite=True)

    def restore(self, path: Path) -> None:
        """Goes on from what `save` wrote; the number of steps and their epochs may be others.

        Raises:
            ModelError: no state there, or that of another configuration or network.
        """
        if not path.exists():
            raise ModelError(f"nothing to resume: no state {path}; without --resume a run begins")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise ModelError(f"nothing to resume: {path} is not a state that anatomynet-train saved") from error
        # How many patients taught what is no configuration, and states older than that count lack it.
        model = model_config_from_json(metadata["model"]) if "model" in metadata else None
        if model is None or not _same_but_patients(model, self.model):
            raise ModelError(f"{path} was trained for another configuration than {self.model.name}: start a new output")
        _check_recipe(metadata.get("train"), self.train, path)
        for prefix, network in (("network", self.network), ("average", self.average)):
            try:
                network.load_state_dict(_with_prefix(tensors, prefix))
            except RuntimeError as error:
                raise ModelError(f"{path} holds another network than this one: start a new output") from error
        self.count_patients(model.patients)  # the checkpoint that the run began with may have had others
        self.step, self.best = int(metadata["step"]), float(metadata["best"])
        losses = json.loads(metadata.get("losses", "[]"))  # states older than that lack them
        self.digests = json.loads(metadata.get("cases", "{}"))
        self.losses[:] = [torch.tensor(loss, device=self.device) for loss in losses]
        self._go_on_after(json.loads(metadata["train"])["steps"] if "train" in metadata else self.train.steps, tensors)

    def _go_on_after(self, steps: int, tensors: dict[str, Tensor]) -> None:
        """Finds the place in this recipe of a run that was planned for so many steps.

        With another number of steps a run may lie in its other stage, or have its statistics frozen by now.
        """
        before = dataclasses.replace(self.train, steps=steps)
        if frozen_from(self.train) < self.step <= frozen_from(before):
            self.network.load_state_dict(self.average.state_dict())
        self.optimiser = self._new_optimiser()
        # At a stage's start what was saved is the memory of the one before.
        if (self.step > second_stage_start(before)) != (self.step >= second_stage_start(self.train)):
            return  # of no use to this one
        saved = self.optimiser.state_dict()
        saved["state"] = {
            i: _with_prefix(tensors, f"optimiser.{i}") for i in range(len(list(self.network.parameters())))
        }
        self.optimiser.load_state_dict(saved)

    def _follow(self) -> None:
        """Moves the averaged weights; early on they follow faster, so that they forget where they began."""
        keep = min(self.train.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(*self._floats, 1 - keep)  # one call for all: a GPU's step is as long as its calls
            for mean, now in self._counts:
                mean.copy_(now)


class _InPrecision(nn.Module):
    """A network that computes in a training's precision."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.network = network
        self._device_type = device.type
        self._bfloat16 = precision == "bfloat16"

    def forward(self, image: Tensor) -> Tensor:
        """Float (n, 1, z, y, x) -> logits."""
        with in_bfloat16(self._device_type, wanted=self._bfloat16):
            logits: Tensor = self.network(image)
        return logits


def _recorded_sizes(train: TrainConfig) -> tuple[tuple[int, ...], ...]:
    """Of crops (z, y, x): each is the same in every case, where the whole body is another size in each."""
    return (train.crop, train.region_crop) if train.region_share else (train.crop,)


def _followed(
    average: nn.Module, network: nn.Module
) -> tuple[tuple[list[Tensor], list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The averaged weights and those they follow, as two lists; and pairs of counts, which cannot be averaged."""
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    return ([mean for mean, _ in floats], [now for _, now in floats]), counts


def _same_but_patients(one: ModelConfig, other: ModelConfig) -> bool:
    return dataclasses.replace(one, patients=()) == dataclasses.replace(other, patients=())


def _check_recipe(saved: str | None, train: TrainConfig, path: Path) -> None:
    """Refuses a recipe with which no run from the start could have come here; older states do not tell theirs."""
    # A state that lacks a share is older than it: it saw no such crop.
    before = {"region_share": 0.0} | json.loads(saved) if saved else {}
    now = json.loads(json.dumps(dataclasses.asdict(train)))
    changed = [name for name in before if name not in MAY_CHANGE and now.get(name) != before[name]]
    if changed:
        told = ", ".join(f"{name} {before[name]} then, {now.get(name)} now" for name in changed)
        raise ModelError(f"{path} was trained otherwise ({told}): nobody could repeat such a run; start a new output")


def _differences(before: CaseDigests, now: CaseDigests) -> Iterator[str]:
    """Of each folder, how many cases are other ones, and the first of them by name."""
    for folder, new in now.items():
        old = before.get(folder, {})
        changed = {name for name in old.keys() & new.keys() if old[name] != new[name]}
        kinds = {"more": new.keys() - old.keys(), "fewer": old.keys() - new.keys(), "changed": changed}
        told = [_counted(sorted(names), kind) for kind, names in kinds.items() if names]
        if told:
            yield f"{folder}: {', '.join(told)}"


def _counted(names: list[str], kind: str) -> str:
    first = ", ".join(names[:CASES_TOLD]) + (", ..." if len(names) > CASES_TOLD else "")
    return f"{len(names)} case{'s' if len(names) > 1 else ''} {kind} ({first})"


def frozen_from(train: TrainConfig) -> int:
    """The step from which batch normalisation keeps its statistics."""
    return round(train.steps * (1 - train.frozen_norm_share))


def second_stage_start(train: TrainConfig) -> int:
    """The step from which SGD takes over (section 3.1); one past the last where there is one stage."""
    return train.steps + 1 if train.optimiser == "adamw" else round(train.steps * (1 - train.second_share))


def rate_at(step: int, train: TrainConfig) -> float:
    """Learning rate at a step."""
    if train.optimiser == "adamw":
        return train.learning_rate * rate_share(step, train)
    return train.learning_rate if step < second_stage_start(train) else train.second_rate


def rate_share(step: int, train: TrainConfig) -> float:
    """Share of AdamW's learning rate at a step: a linear warm-up, then half a cosine."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _channels_last(network: nn.Module) -> nn.Module:
    """The layout in which 3-D convolutions are fastest."""
    # torch's stubs know memory_format only for 4-D tensors.
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
