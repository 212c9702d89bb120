"""What every test run shares: a skipped test must be on the list of allowed skips, and each `soak` test leaves a line in the journal."""
import datetime, fnmatch, json, os

os.environ.setdefault("OMP_NUM_THREADS", "1")           # two cores, and pages run beside the tests

import pytest

pytest_plugins = "pytester"

def allowed(root):
    "The patterns of tests/allowed_skips: pairs of test and reason."
    file = root/"tests"/"allowed_skips"
    lines = [line.strip() for line in file.read_text().splitlines()] if file.exists() else []
    return [[part.strip() for part in line.split(" | ", 1)] for line in lines if line and not line.startswith("#")]

class Watch:
    "Notes the skips that nobody allowed, and writes the journal of long tests."
    def __init__(self, root): self.root, self.skips, self.allowed = root, [], allowed(root)

    def note(self, report):
        if report.outcome != "skipped": return
        reason = getattr(report, "wasxfail", None) or (report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr))
        reason = reason.removeprefix("Skipped: ")
        if not any(fnmatch.fnmatch(report.nodeid, test) and fnmatch.fnmatch(reason, why) for test, why in self.allowed):
            self.skips.append(f"{report.nodeid}: {reason}")

    pytest_collectreport = note

    def pytest_runtest_logreport(self, report):
        self.note(report)
        if report.when == "call" and "soak" in report.keywords:
            line = dict(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 1),
                day=datetime.date.today().isoformat(), **dict(report.user_properties))
            journal = self.root/"soak"/"journal.jsonl"
            journal.parent.mkdir(exist_ok=True)
            with journal.open("a") as f: f.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if self.skips and exitstatus == 0: session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.skips:
            terminalreporter.section("skipped, and not in tests/allowed_skips")
            for line in self.skips: terminalreporter.line(line)

@pytest.fixture(scope="session", autouse=True)
def pages(request, tmp_path_factory):
    "The pages that this session asked for, under way from its start on."
    asked = [i.callspec.params["page"] for i in request.session.items if getattr(i, "originalname", "") == "test_page_runs"]
    if not asked: yield; return
    from test_pages import ahead
    with ahead(asked, tmp_path_factory.mktemp("pages")) as running: yield running

def pytest_collection_modifyitems(items):
    "Pages come last: by then the other process has run most of them."
    items.sort(key=lambda i: getattr(i, "originalname", "") == "test_page_runs")

def pytest_configure(config): config.pluginmanager.register(Watch(config.rootpath), "watch")
