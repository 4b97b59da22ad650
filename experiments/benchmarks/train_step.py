"""Seconds of a training step, side by side with plain flax, PyTorch and Keras.

Command: python experiments/benchmarks/train_step.py --model=densenet_bc_100_12 --batch_size=64
             [--implementations=in_place,in_place:layer,concat,flax,torchvision,torch_compile,keras]
             [--torch_python=PATH] [--format=json]

`in_place` and `concat` are the package's own step in that block's form, `in_place:layer` with that
recompute level, `densejax` is the step at the network's default fields. All start from the same
weights and train on the same synthetic images, which lie on the device: uint8 for us and the plain
flax network, normalised floats for the others, in their favour. The loss and the gradient of the
first step must agree before anything is timed; later ones differ by rounding, in ResNet-50 by some
percent.
"""

import compare

from experiments import script

if __name__ == "__main__":
    ours = {
        True: "in_place,concat,flax,torchvision,torch_compile,keras",
        False: "densejax,torchvision,torch_compile",
    }
    script.run(lambda: compare.main("train", __doc__, ours))
