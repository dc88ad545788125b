"""RunPod's Hub looks for a file of this name. The image itself runs `python -m handler`, and so does this."""

import os
import sys

os.execv(sys.executable, [sys.executable, "-m", "handler", *sys.argv[1:]])  # noqa: S606 - no shell
