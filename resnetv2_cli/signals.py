"""The signals on which a run saves and leaves, each with its exit status."""

import signal

SIGNALS: dict[int, int] = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: 138,
    signal.SIGUSR2: 140,
}
