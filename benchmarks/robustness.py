"""Benchmark of clean accuracy and accuracy under BIM against other libraries.

Run it as a plain script: ``python benchmarks/robustness.py [--weights FILE --images FILE] [--rounds 5]``. Every
library evaluates the same network on the same images in turn, and the floor is timed between them: quote ratios, not
seconds. A pass is one forward pass and one backward pass to the input. The floor is the number of passes that are
needed, times the time of one pass through the network with batch normalization folded and channels last. Libraries
that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from results import Result
from rich.console import Console
from torch import Tensor, nn

from lightning_normgeo import ResNetClassifier
from lightning_normgeo.robustness import RobustnessSettings, folded_model
from lightning_normgeo.robustness.attacks.search.batch_size import fitting_batch
from lightning_normgeo.robustness.attacks.search.projected_gradient import ascent
from lightning_normgeo.robustness.inputs import DeclaredInputs
from lightning_normgeo.robustness.loader_evaluation import LoaderEvaluation
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.results.samples.process_shares import report_of

_CLASSES = 10
_FORWARD = 1 / 3
"""Cost of a forward pass, as a fraction of one forward pass plus one backward pass to the input."""
_BETWEEN = 16
"""Number of batches after which the floor is timed again."""
REFERENCE = "torchattacks.BIM"


class Task(NamedTuple):
    """Network, images and attack settings that every library gets."""

    net: ResNetClassifier
    images: Tensor
    labels: Tensor
    batch: int
    eps: float
    steps: int
    between: Callable[[], None] = lambda: None
    """Called after every few batches, to time the floor while the machine is as busy as it is for the libraries."""

    @property
    def step_size(self) -> float:
        return self.eps / 4

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of each batch."""
        for number, batch in enumerate(zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)):
            if number % _BETWEEN == 0:
                self.between()
            yield batch

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return a boolean for each image: True if the network classifies it correctly."""
        with torch.no_grad():
            return self.net(images).argmax(1) == labels

    def first(self) -> Task:
        """Return a task that has only the first batch."""
        return self._replace(images=self.images[: self.batch], labels=self.labels[: self.batch])


class Answer(NamedTuple):
    """Per-sample results, clean and under attack, and the number of passes that they need at least."""

    clean: Tensor
    attacked: Tensor
    passes: float


Contender = Callable[[Task], Answer]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]


def now() -> float:
    """Wait until the GPU has finished all work; return the time in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _clock()


def final(task: Task, parts: list[tuple[Tensor, Tensor]]) -> Answer:
    """Join the batches of an attack whose last iterate counts; its first pass also classifies the clean images."""
    clean, attacked = (torch.cat(column) for column in zip(*parts, strict=True))
    return Answer(clean, attacked, len(clean) * (task.steps + _FORWARD))


def with_torchattacks(task: Task) -> Answer:
    """Evaluate with torchattacks."""
    import torchattacks

    attack = torchattacks.BIM(task.net, eps=task.eps, alpha=task.step_size, steps=task.steps)
    return final(task, [(task.right(x, y), task.right(attack(x, y), y)) for x, y in task.batches()])


def with_foolbox(task: Task) -> Answer:
    """Evaluate with foolbox, which returns whether each image is adversarial."""
    import foolbox

    model = foolbox.PyTorchModel(task.net, bounds=(0, 1))
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=task.step_size, steps=task.steps, random_start=False)
    parts = [(task.right(x, y), ~attack(model, x, y, epsilons=task.eps)[2]) for x, y in task.batches()]
    task.net.zero_grad(set_to_none=True)
    return final(task, parts)


def with_art(task: Task) -> Answer:
    """Evaluate with the Adversarial Robustness Toolbox, which takes and returns numpy arrays."""
    from art.attacks.evasion import BasicIterativeMethod
    from art.estimators.classification import PyTorchClassifier

    kind = "gpu" if task.images.is_cuda else "cpu"
    shape = tuple(task.images.shape[1:])
    model = PyTorchClassifier(
        task.net, nn.CrossEntropyLoss(), shape, _CLASSES, clip_values=(0.0, 1.0), device_type=kind
    )
    attack = BasicIterativeMethod(
        model, eps=task.eps, eps_step=task.step_size, max_iter=task.steps, batch_size=task.batch, verbose=False
    )
    images, labels = task.images.cpu().numpy(), task.labels.cpu().numpy()
    clean = model.predict(images, task.batch).argmax(1) == labels
    attacked = model.predict(attack.generate(images, labels), task.batch).argmax(1) == labels
    task.net.zero_grad(set_to_none=True)
    return final(task, [(torch.from_numpy(clean), torch.from_numpy(attacked))])


def ours(joined: bool = True, **settings: Any) -> Contender:
    """Return an evaluation by this package, in joined batches or in the batch size of the other libraries."""

    def evaluate(task: Task) -> Answer:
        ball = {"eps": task.eps, "step_size": task.step_size, "steps": task.steps}
        size = None if joined else task.batch
        given = RobustnessSettings(attacks=["bim"], batch_size=size, **ball, **settings)
        evaluation = LoaderEvaluation(task.net, task.net, given, DeclaredInputs(), None)
        for images, labels in task.batches():
            with preserved_state(task.net):
                evaluation.add(images, labels)
        decisions = report_of([evaluation.finish()], given, evaluation.shown).decisions
        answer = final(task, [(decisions.of("clean").correct, decisions.of("bim").correct)])
        if given.semantics == "final" or evaluation.evaluator is None:
            return answer
        stages = evaluation.evaluator.attacks._stages.values()
        return answer._replace(passes=len(answer.clean) + sum(stage.passes for stage in stages))

    return evaluate


CONTENDERS: dict[str, Contender] = {
    REFERENCE: with_torchattacks,
    "foolbox LinfBasicIterativeAttack": with_foolbox,
    "ART BasicIterativeMethod": with_art,
    "ours, final": ours(),
    "ours, final, batches not joined": ours(joined=False),
    "ours, final, not joined nor folded": ours(joined=False, fold=False),
    "ours, any": ours(semantics="any"),
    "ours, final, bf16": ours(autocast="bf16"),
    "ours, final, bf16, verified": ours(autocast="bf16-verified"),
    "ours, any, bf16, verified": ours(semantics="any", autocast="bf16-verified"),
}


class Floor:
    """Times single passes through the folded network."""

    def __init__(self, task: Task) -> None:
        self.net = task.net
        self.folded = folded_model(task.net, task.net, task.first().images)
        first = task.first()
        size = fitting_batch(self._logits, first.images, first.labels)
        self.images, self.labels = task.images[:size], task.labels[:size]
        self.seconds: list[float] = []
        self.spent = 0.0

    def measure(self, repeats: int = 3) -> None:
        """Time a few passes of one batch, in seconds per image; add up the time that this takes."""
        start = now()
        with self.folded.active() if self.folded is not None else nullcontext():
            for _ in range(repeats):
                began = now()
                ascent(self._logits, self.images, self.labels)
                self.seconds.append((now() - began) / len(self.labels))
        self.spent += now() - start

    def _logits(self, images: Tensor) -> Tensor:
        return self.net(images.contiguous(memory_format=torch.channels_last))


def structured(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images of coarse patterns, one for each class, with noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(_CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    labels = torch.randint(_CLASSES, (n,), generator=generator)
    contrast = 0.1 + 0.7 * torch.rand(n, 1, 1, 1, generator=generator)
    shades = contrast * nn.functional.interpolate(patterns[labels], size=32, mode="bilinear")
    noise = 0.25 * torch.randn(shades.shape, generator=generator)
    return (255 * (0.5 + shades + noise).clamp(0, 1)).byte(), labels


def train(net: ResNetClassifier, device: str, steps: int = 60) -> None:
    """Train a network briefly on images of :func:`structured`."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images, labels = structured(32 * steps, seed=1)
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x.to(device).float() / 255), y.to(device), label_smoothing=0.2)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def prepare(options: Any) -> Task:
    """Load or generate the network and the images."""
    torch.manual_seed(0)
    net = ResNetClassifier(num_classes=_CLASSES, arch=options.arch, stem=options.stem).to(options.device)
    if options.weights:
        net.load_state_dict(torch.load(options.weights, map_location=options.device))
    else:
        train(net, options.device)
    images, labels = torch.load(options.images) if options.images else structured(options.samples, seed=2)
    pixels = images[: options.samples].float() / 255
    labels = labels[: options.samples].long()
    return Task(
        net.eval(), pixels.to(options.device), labels.to(options.device), options.batch_size, options.eps, options.steps
    )


def measured(
    task: Task, rounds: int, only: Sequence[str]
) -> tuple[dict[str, list[float]], dict[str, Answer], Floor, list[str]]:
    """Run the contenders in turn; return times, answers, the floor, and a line for each missing library."""
    floor, missing = Floor(task), []
    times: dict[str, list[float]] = {}
    answers: dict[str, Answer] = {}
    for name in only or CONTENDERS:
        try:
            CONTENDERS[name](task.first())  # warm-up: allocates memory, compiles and chooses algorithms
        except ImportError as error:
            missing.append(f"{name}: skipped, {error}")
        else:
            times[name] = []
    floor.measure()
    floor.seconds.clear()
    task = task._replace(between=lambda: floor.measure(1))
    for turn in range(rounds):
        order = list(times)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            floor.measure()
            began, spent = now(), floor.spent
            answers[name] = CONTENDERS[name](task)
            times[name].append(now() - began - (floor.spent - spent))
    floor.measure()
    return times, answers, floor, missing


def table(options: Any, task: Task) -> tuple[Result, list[str]]:
    """Return the table of all contenders, and a line for each missing library."""
    times, answers, floor, missing = measured(task, options.rounds, options.only)
    single = statistics.median(floor.seconds)
    reference = answers.get(REFERENCE, next(iter(answers.values())))
    base = statistics.median(times[REFERENCE]) if REFERENCE in times else None
    rows = []
    for name, answer in answers.items():
        seconds, needed = statistics.median(times[name]), answer.passes * single
        clean, attacked = (f"{100 * right.double().mean().item():.2f} %" for right in answer[:2])
        pairs = zip(answer[:2], reference[:2], strict=True)
        differing = " / ".join(str(int((mine.cpu() != theirs.cpu()).sum())) for mine, theirs in pairs)
        faster = f"{base / seconds:.2f}" if base else ""
        rows.append((name, f"{seconds:.2f}", faster, f"{needed:.2f}", f"{seconds / needed:.2f}", clean, attacked))
        rows[-1] += (differing,)
    title = (
        f"Clean accuracy and accuracy under BIM: {options.arch}, stem {options.stem}, {len(task.labels)} images in "
        f"batches of {task.batch}, {task.steps} steps, eps {255 * task.eps:g}/255"
    )
    columns = ("", "s", "times as fast", "floor, s", "× floor", "clean", "BIM", "decisions that differ, clean / BIM")
    return Result(title, columns, rows), missing


def parser_of(description: str | None, samples: int, batch_size: int) -> argparse.ArgumentParser:
    """Return a parser of the arguments that :func:`prepare` takes, but for the radius, and of the threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--weights", help="state_dict of a ResNetClassifier. Default: trained briefly")
    parser.add_argument("--images", help="torch.save'd (uint8 images, labels). Default: generated")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    """Run the benchmark and print its table."""
    parser = parser_of(__doc__, samples=256, batch_size=64)
    parser.add_argument("--eps", type=float, default=8, help="radius, in units of 1/255")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=(), help="Default: all contenders")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: time of this process alone")
    parser.add_argument("--markdown", action="store_true", help="print the table for a document")
    options = parser.parse_args()
    options.eps /= 255
    global _clock
    _clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    result, missing = table(options, prepare(options))
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    machine = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if options.markdown:
        print("\n".join([result.markdown(), *missing, machine]))
        return
    console = Console(width=140)
    result.show(console)
    console.print("\n".join([*missing, machine]))


if __name__ == "__main__":
    main()
