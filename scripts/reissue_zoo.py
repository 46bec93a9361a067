"""Write cards, manifests and the index of a zoo again from its entries' `config.json`; weights stay untouched.

Run it after an edit of a `config.json` or a change of the card's text: python scripts/reissue_zoo.py [ZOO]
"""

from __future__ import annotations

import sys
from pathlib import Path

from embedkit.authoring.reissue import reissue_zoo

if __name__ == "__main__":
    zoo = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "zoo"
    changed = reissue_zoo(zoo)
    print(f"{zoo}: {len(changed)} entries changed: {', '.join(changed) or 'none'}")
