//! Programs that must end in time, with everything they said.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest that a program may take if nobody says otherwise. The slowest is a copy of the largest
/// image on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(240);

/// How a program ended and what it said.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
    line: String,
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output, if the program succeeded; else a panic that tells everything.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == 0, "{self}");
        self.text()
    }

    /// Standard error, if the program ended with `code`; else a panic that tells everything.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert!(self.code == code, "expected exit code {code}\n{self}");
        self.stderr
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            code,
            stderr,
            took,
            line,
            ..
        } = self;
        let out = self.text();
        write!(
            f,
            "`{line}` ended with {code} after {took:.1?}\n--- stdout\n{out}\n--- stderr\n{stderr}"
        )
    }
}

/// Runs a program to its end.
///
/// Waits until the program is gone *and* its output is closed, as a shell's `$(…)` does: a background
/// process that keeps the output open is found out.
#[track_caller]
pub fn run(command: &mut Command) -> Finished {
    run_within(command, DEADLINE)
}

/// [`run`] with a deadline; a program that is not done then is killed and the test fails.
#[track_caller]
pub fn run_within(command: &mut Command, deadline: Duration) -> Finished {
    let line = line_of(command);
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("can't start `{line}`: {e}"));
    let stdout = read_all(child.stdout.take());
    let stderr = read_all(child.stderr.take());
    let status = loop {
        if let Some(status) = child
            .try_wait()
            .unwrap_or_else(|e| panic!("waiting for `{line}`: {e}"))
        {
            break status;
        }
        if started.elapsed() > deadline {
            kill(&mut child);
            panic!(
                "`{line}` was not done after {deadline:?}{}",
                tails(&stdout, &stderr)
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    while !(stdout.is_finished() && stderr.is_finished()) {
        if started.elapsed() > deadline {
            panic!(
                "`{line}` ended but something it started keeps its output open: `$(…)` would hang"
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    use std::os::unix::process::ExitStatusExt;
    Finished {
        code: status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        stdout: stdout.join().unwrap_or_default(),
        stderr: String::from_utf8_lossy(&stderr.join().unwrap_or_default()).into_owned(),
        took: started.elapsed(),
        line,
    }
}

fn tails(stdout: &JoinHandle<Vec<u8>>, stderr: &JoinHandle<Vec<u8>>) -> String {
    format!(
        " (stdout closed: {}, stderr closed: {})",
        stdout.is_finished(),
        stderr.is_finished()
    )
}

fn read_all(stream: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // Whatever arrived before an error is what there is to tell.
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Ends a process that this one started, and waits for it.
pub fn kill(child: &mut Child) {
    // It may be gone already: then there is nothing to end.
    let _ = child.kill();
    let _ = child.wait();
}

/// The command as a person would type it.
pub fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|w| w.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs `program args…` and gives its output; panics if it fails.
#[track_caller]
pub fn sh(program: &str, args: &[&str]) -> String {
    run(Command::new(program).args(args)).ok()
}

/// Waits until `what` holds; panics with `what` after `deadline`.
#[track_caller]
pub fn wait_for(what: &str, deadline: Duration, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(
            started.elapsed() < deadline,
            "not so after {deadline:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
