"""Names and forms that differ between the supported releases of the libraries."""

from importlib.metadata import version

from packaging.version import Version

TRANSFORMERS = Version(version("transformers"))
# `datasets` 4 has another form of lists, and transformers 5 another class of tokenizers, than those
# before: what was stored by these is not read by them.
READS_STORED_DATA = Version(version("datasets")).major >= 4 and TRANSFORMERS.major >= 5


def dtype_of(dtype):
    """The keyword by which transformers' model classes take a dtype."""
    return {"dtype" if Version("4.56") <= TRANSFORMERS else "torch_dtype": dtype}
