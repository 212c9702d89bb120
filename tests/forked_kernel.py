"""Kernels forked from one process that has loaded torch, which takes two CPU seconds that no page need spend again. `serve` is that process; as a script, this file asks it for a kernel and lives as long as the kernel."""
import importlib, json, os, select, signal, socket, sys

def serve(path):
    "One kernel for each connection, until standard input ends."
    import threading
    import ipykernel.kernelapp
    importlib.import_module("torch._dynamo")                            # torch, and its compiler, which the first optimizer of a page loads
    def become(c):
        text, fds, *_ = socket.recv_fds(c, 2**20, 3)
        while not text.endswith(b"\n"): text += c.recv(2**20)
        folder, environment, arguments = json.loads(text)
        for i,fd in enumerate(fds): os.dup2(fd, i); os.close(fd)
        os.chdir(folder); os.environ.clear(); os.environ.update(environment)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        threading.Thread(target=lambda: (c.recv(1), os._exit(1)), daemon=True).start()     # who asked for it is gone
        ipykernel.kernelapp.launch_new_instance(argv=[*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)                      # nobody waits for a kernel: its end closes the connection
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path + "~"); s.listen(); os.rename(path + "~", path)
        while sys.stdin not in select.select([s, sys.stdin], [], [])[0]:
            with s.accept()[0] as c:
                if not os.fork(): s.close(); become(c)

def ask(path, *arguments):
    "A kernel of that process, with this one's folder, environment and output."
    with socket.socket(socket.AF_UNIX) as c:
        c.connect(path)
        text = json.dumps([os.getcwd(), dict(os.environ), arguments]).encode() + b"\n"
        c.sendall(text[socket.send_fds(c, [text], [0, 1, 2]):])
        while c.recv(1): pass

if __name__ == "__main__": serve(sys.argv[2]) if sys.argv[1] == "serve" else ask(*sys.argv[1:])
