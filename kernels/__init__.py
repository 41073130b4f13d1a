"""Triton kernels, installed as ``moco_fast.kernels``.

The folder is named ``kernels`` in the source tree only. Imported under that
bare name it would shadow an unrelated, well-known package.
"""

if __name__ == "kernels":
    raise ImportError(
        "'kernels' is a source folder of moco_fast, not a package: import moco_fast.kernels, "
        "or leave moco_fast's source tree if you meant the package named 'kernels'"
    )
