"""Images and labels of a project's batches, and the relation of images to pixels."""

from lightning_normgeo.robustness.inputs.batches import images_and_labels as images_and_labels
from lightning_normgeo.robustness.inputs.batches import unpacked as unpacked
from lightning_normgeo.robustness.inputs.class_labels import class_indices as class_indices
from lightning_normgeo.robustness.inputs.class_labels import class_logits as class_logits
from lightning_normgeo.robustness.inputs.declared_inputs import DeclaredInputs as DeclaredInputs
from lightning_normgeo.robustness.inputs.declared_inputs import declared_inputs as declared_inputs
from lightning_normgeo.robustness.inputs.evidence import input_space as input_space
from lightning_normgeo.robustness.inputs.input_space import InputSpace as InputSpace
from lightning_normgeo.robustness.inputs.input_space import Space as Space
