"""Distil a low-bit student from a full-precision teacher, without labels: `sqakd distill` as a script to launch.

    accelerate launch examples/run_sqakd.py --model timm/resnet18
    accelerate launch examples/run_sqakd.py --model timm/test_resnet --dataset fashion_mnist --max_train_images 10000 \
        --weight_bits 4 --activation_bits 4 --quantizer ewgs

`--help` lists the arguments; sqakd_hf/cli/distill.py is the code, an example of the whole way by the public API.
"""

import sys

from sqakd_hf.cli import main


if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
