"Native mutants are tried in a process of their own: one that writes past its tensors tears it down, which notices it too."
import os, signal, traceback

def noticed(check):
    "Does the check fail by an assertion, or its process by what the mutant did to memory?"
    if not (pid := os.fork()):
        code = 4
        try: check(); code = 0
        except AssertionError: code = 3
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    end = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert end in (0, 3, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS), f"the check ended neither by itself nor by an assertion ({end})"
    return end != 0
