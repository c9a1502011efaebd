"""What is compiled when kvstore is installed; all else is said in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# Reductions may be reordered, so that they become vector instructions; infinities and NaNs keep
# their meaning.
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
]

ParallelCompile().install()
setup(
    ext_modules=[
        Pybind11Extension(
            f"{package}._native",
            sorted(glob(f"{package}/native/*.cpp")),
            depends=[*sorted(glob("*/native/*.h")), "kvstore/native/share.cpp"],
            include_dirs=["."],
            cxx_std=17,
            extra_compile_args=FLAGS,
            libraries=["dl"] if sys.platform == "linux" else [],  # apart in older C libraries
        )
        for package in ("kvstore", "model")
    ]
)
