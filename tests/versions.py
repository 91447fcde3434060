"""What has another name in other releases of the libraries that we support."""

import transformers
from packaging.version import Version


def dtype_of(dtype):
    """The keyword by which transformers' model classes take a dtype."""
    renamed = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if renamed else "torch_dtype": dtype}
