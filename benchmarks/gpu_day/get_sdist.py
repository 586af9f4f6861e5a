"""Download a source distribution from the index that pip uses. Unlike pip, this does not build its metadata.

python benchmarks/gpu_day/get_sdist.py NAME VERSION FOLDER
"""

import re
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from pip._internal.models.index import PyPI


def main() -> None:
    """Find the file in the index and write it into the folder."""
    name, version, folder = sys.argv[1:]
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    index = subprocess.run(command, capture_output=True, text=True).stdout.strip() or PyPI.simple_url
    page_url = f"{index.rstrip('/')}/{name.replace('_', '-')}/"
    page = urllib.request.urlopen(page_url).read().decode()
    file = f"{name}-{version}.tar.gz"
    link = re.search(rf'href="([^"#]*{re.escape(file)})', page)
    if not link:
        sys.exit(f"{file} is not in pip's index")
    Path(folder, file).write_bytes(urllib.request.urlopen(urllib.parse.urljoin(page_url, link[1])).read())


if __name__ == "__main__":
    main()
