"""Links that hold away from the repository: in the README that a package index shows, and its URLs.

A link such as `docs/attacks.md` leads nowhere there. `REPOSITORY` in the environment is the address
of the repository when a package is built:

    REPOSITORY=https://github.com/NAME/llm_attack python -m build

Then links and images lead to files of the tag of this version. Without it they stay as they are.
"""

import os
import re
from pathlib import Path
from posixpath import splitext
from typing import Any
from urllib.parse import urlsplit

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)(?=\))")
IMAGES = (".png", ".svg")


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown whose relative links lead into `repository`, as GitHub and GitLab name its files."""

    def address(link: re.Match[str]) -> str:
        kind = "raw" if splitext(link[1])[1] in IMAGES else "blob"
        return f"{repository}/{kind}/{tag}/{link[1]}"

    return LINK.sub(address, text)


class LinksHook(MetadataHookInterface):
    """Gives the package its README and its URLs."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text("utf-8")
        urls = {"Paper": "https://arxiv.org/abs/2205.01493"}
        repository = os.environ.get("REPOSITORY", "").rstrip("/")
        if repository:
            address = urlsplit(repository)
            if address.scheme != "https" or not address.netloc or not address.path:
                raise ValueError(
                    f"REPOSITORY={repository}: must be the https address of a repository,"
                    " such as https://github.com/NAME/llm_attack"
                )
            tag = f"v{metadata['version']}"
            text = absolute(text, repository, tag)
            urls |= {
                "Repository": repository,
                "Documentation": f"{repository}/blob/{tag}/docs/start/first-attack.md",
                "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls
