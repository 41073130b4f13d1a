"""``vits`` with a transformer that a CPU trains."""

from functools import partial

from moco_fast.models.vits import small_vit

vit_tiny = partial(small_vit, in_chans=3, img_size=16)
