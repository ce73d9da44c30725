"""A headless Chromium that is started once and loads pages, by its DevTools protocol.

Commands and answers are JSON, each followed by a 0 byte, in two pipes: the browser's files 3 and 4.
"""

import json
import os
import signal

QUIET = "background-networking component-update extensions gpu quic sync".split()


class Browser:
    """dom(address) loads pages; close() ends it. folder: for its profile."""

    def __init__(self, chromium, folder):
        commands, self.commands = os.pipe()
        answers, there = os.pipe()
        flags = ["--headless", "--no-sandbox", "--no-first-run", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={folder}", *(f"--disable-{x}" for x in QUIET)]
        files = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_WRONLY, 0) for n in (1, 2)]
        files += [(os.POSIX_SPAWN_DUP2, commands, 3), (os.POSIX_SPAWN_DUP2, there, 4)]
        self.pid = os.posix_spawn(chromium, [chromium, *flags], os.environ, file_actions=files)
        os.close(commands)
        os.close(there)
        self.answers = os.fdopen(answers, "rb")
        self.number, self.buffer, self.events = 0, b"", []

    def read(self):
        """The browser's next message."""
        while b"\0" not in self.buffer:
            more = os.read(self.answers.fileno(), 2**20)
            assert more, "the browser has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, **params):
        """Runs a command -> its result. Events that arrive meanwhile are kept."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        command |= {"sessionId": session} if session else {}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (message := self.read()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, (method, message)
        return message["result"]

    def wait_for(self, name):
        """Reads until an event of this name has arrived."""
        while not any(event["method"] == name for event in self.events):
            self.events.append(self.read())

    def dom(self, address):
        """Loads a page in a tab of its own, and lets 5 s pass for its scripts without waiting for
        them -> (the DOM as text, [what the page said on the console or raised])."""
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable", page)
        self.events = []
        self.call("Page.navigate", page, url=address)
        self.wait_for("Page.loadEventFired")
        policy = dict(policy="pauseIfNetworkFetchesPending", budget=5000)
        self.call("Emulation.setVirtualTimePolicy", page, **policy)
        self.wait_for("Emulation.virtualTimeBudgetExpired")
        html = "'<!DOCTYPE html>' + document.documentElement.outerHTML"
        found = self.call("Runtime.evaluate", page, expression=html)["result"]["value"]
        said = []
        for event in self.events:
            if event["method"] in (
                "Runtime.consoleAPICalled",
                "Runtime.exceptionThrown",
                "Log.entryAdded",
            ):
                said.append(json.dumps(event["params"]))
        self.call("Target.closeTarget", targetId=tab)
        return found, said

    def close(self):
        """Ends the browser."""
        os.close(self.commands)
        self.answers.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
