"""No Trainer: the same measurements in a training loop of plain torch.

``scale_invariant_units`` finds the units, ``StepProbe`` reads the weights around an optimizer step, the functions of
``geometry`` turn its inner products into quantities, and ``evaluate_robustness`` attacks the trained network. Lightning
is never imported.

Prints for every measured step the largest |cos(W, ∇W)|, the increment of ‖W‖² over all scale-invariant weights, and
the increment that the formula of SGD with momentum and weight decay gives; then the table of the robustness evaluation.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_normgeo import evaluate_robustness, scale_invariant_units
from lightning_normgeo.geometry import cosine, measured_increment
from lightning_normgeo.probes import Observed, StepProbe

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # pixels in [0, 1]
train, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU())
second = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
network = nn.Sequential(first, second, nn.Flatten(), nn.Linear(32 * 9, 10))
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

parameters = dict(network.named_parameters())
invariant = [units for units in scale_invariant_units(network, images[:8]) if units.invariant]
probe = StepProbe()
probe.weights = [Observed(units, parameters[units.name], parameters.get(units.bias or "")) for units in invariant]
probe.attach([optimizer])

step = 0
for _ in range(5):
    for batch, labels in DataLoader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels).backward()
        step += 1
        if step % 20 == 0:
            probe.arm(updates=True)
        optimizer.step()
        measured = probe.collect()  # None unless this step was measured
        if measured is not None:
            steps = measured.steps.values()
            cosines = torch.cat([cosine(one.inner, one.weight_sq, one.gradient_sq) for one in steps])
            changes = [measured_increment(one.update.weight_update, one.update.update_sq) for one in steps]
            explained = torch.cat([one.terms.total for one in steps]).sum()
            largest, increment = cosines.abs().max(), torch.cat(changes).sum()
            print(f"step {step}: max |cos| {largest:.1e}, increment {increment:+.6f}, explained {explained:+.6f}")
probe.detach()

print(evaluate_robustness(network, DataLoader(test, batch_size=64), attacks=["gaussian", "bim"], progress=False))
