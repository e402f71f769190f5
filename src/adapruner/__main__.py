"""The program: `adapruner`, or `python -m adapruner`."""

import signal

# While libraries are imported, and after `main`, Ctrl-C ends without a traceback. A background job ignores it.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from adapruner.cli import main

if __name__ == "__main__":
    main()
