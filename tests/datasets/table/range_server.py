"""A server of ranges of files, in a process of its own: GDAL may hold Python's lock as it waits.

Prints its port. Answers the first requests with errors, as many as it is told.
"""

import http.server
import sys
from pathlib import Path


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Server of ranges of files. '/sent' is the number of bytes that it has sent."""

    failures = int(sys.argv[2])
    sent = 0

    def do_GET(self) -> None:
        if self.path == '/sent':
            self._send(str(Ranges.sent).encode(), 200)
            return
        if Ranges.failures > 0:
            Ranges.failures -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        given = self.headers.get('Range')
        if given is None:
            Ranges.sent += len(content)
            self._send(content, 200)
            return
        first, _, last = given.removeprefix('bytes=').partition('-')
        start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        Ranges.sent += end + 1 - start
        self._send(content[start : end + 1], 206, f'bytes {start}-{end}/{len(content)}')

    def _send(self, content: bytes, code: int, part: str | None = None) -> None:
        self.send_response(code)
        self.send_header('Accept-Ranges', 'bytes')
        if part is not None:
            self.send_header('Content-Range', part)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    """Serve a folder until the process is stopped."""
    folder = sys.argv[1]
    with http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), lambda *args: Ranges(*args, directory=folder)
    ) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == '__main__':
    main()
