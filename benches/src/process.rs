//! Runs programs and measures them: wall clock, CPU time, peak memory.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{BenchError, io};

/// How often a running program's memory and CPU time are looked at. The last look before its end
/// counts, so what it does in its last milliseconds is not seen.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The kernel's unit of CPU time in /proc/PID/stat, in Hz: USER_HZ is 100 on every Linux.
const USER_HZ: f64 = 100.0;

/// A program that ended well.
#[derive(Debug)]
pub struct Finished {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// From before it was started to its end.
    pub wall: Duration,
    /// Peak resident memory in bytes (VmHWM).
    pub peak_bytes: u64,
    /// User and system time in seconds.
    pub cpu_s: f64,
}

/// Runs a program to its end.
///
/// Output goes to unnamed files, not to pipes: `lazyimg mount` leaves a daemon behind, which must
/// not hold us up if it keeps them open.
pub fn run(command: &mut Command) -> Result<Finished, BenchError> {
    let name = line(command);
    let temp = || tempfile::tempfile().map_err(io("temporary file for a program's output"));
    let (mut out, mut err) = (temp()?, temp()?);
    let dup = |f: &File| f.try_clone().map_err(io("duplicating a file descriptor"));
    command
        .stdin(Stdio::null())
        .stdout(dup(&out)?)
        .stderr(dup(&err)?);
    let started = Instant::now();
    let mut child = command.spawn().map_err(io(format!("starting `{name}`")))?;
    let (status, wall, usage) = watch(&mut child, started)?;
    let stdout = contents(&mut out)?;
    if !status.success() {
        let stderr = String::from_utf8_lossy(&contents(&mut err)?).into_owned();
        return Err(BenchError::Command {
            command: name,
            status: status.to_string(),
            stderr,
        });
    }
    Ok(Finished {
        stdout,
        wall,
        peak_bytes: usage.peak_bytes,
        cpu_s: usage.cpu_s,
    })
}

/// Like [`run`], with a file as standard input.
pub fn run_with_input(command: &mut Command, input: &Path) -> Result<Finished, BenchError> {
    let name = line(command);
    let input = File::open(input).map_err(crate::error::at(input))?;
    command
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit());
    let started = Instant::now();
    let mut child = command.spawn().map_err(io(format!("starting `{name}`")))?;
    let (status, wall, usage) = watch(&mut child, started)?;
    if !status.success() {
        let stderr = "see above".into();
        return Err(BenchError::Command {
            command: name,
            status: status.to_string(),
            stderr,
        });
    }
    Ok(Finished {
        stdout: Vec::new(),
        wall,
        peak_bytes: usage.peak_bytes,
        cpu_s: usage.cpu_s,
    })
}

fn watch(
    child: &mut Child,
    started: Instant,
) -> Result<(std::process::ExitStatus, Duration, Usage), BenchError> {
    let (pid, ended) = (child.id(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut last = Usage::default();
            while !ended.load(Ordering::Relaxed) {
                if let Some(now) = Usage::of(pid) {
                    // A program that becomes another one (exec) begins a new count.
                    last = Usage {
                        peak_bytes: last.peak_bytes.max(now.peak_bytes),
                        ..now
                    };
                }
                std::thread::park_timeout(LOOK_EVERY);
            }
            last
        });
        let status = child.wait();
        let wall = started.elapsed();
        ended.store(true, Ordering::Relaxed);
        watcher.thread().unpark();
        let usage = watcher.join().unwrap_or_default();
        Ok((status.map_err(io("waiting for a program"))?, wall, usage))
    })
}

fn contents(file: &mut File) -> Result<Vec<u8>, BenchError> {
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .map_err(io("a program's output"))?;
    Ok(bytes)
}

/// A command line for messages.
pub fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|a| a.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Peak resident memory in bytes.
    pub peak_bytes: u64,
    /// Resident anonymous memory in bytes, now.
    pub anonymous_bytes: u64,
    /// User and system time in seconds.
    pub cpu_s: f64,
}

impl Usage {
    /// Of a running process; `None` when it is gone.
    pub fn of(pid: u32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            peak_bytes: kib(&status, "VmHWM:")?,
            anonymous_bytes: kib(&status, "RssAnon:")?,
            cpu_s: cpu_s(&stat)?,
        })
    }
}

fn kib(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix(field))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

/// Fields 14 and 15 of /proc/PID/stat; the name before them may hold spaces and parentheses.
fn cpu_s(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / USER_HZ)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_an_odd_name() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0";
        assert_eq!(cpu_s(stat), Some(3.0));
    }

    #[test]
    fn peak_memory_of_a_program_is_seen() {
        let script = "b=$(head -c 50000000 /dev/zero | tr '\\0' x); sleep 0.1";
        let done = run(Command::new("bash").args(["-c", script])).unwrap();
        assert!(done.peak_bytes > 50_000_000, "{}", done.peak_bytes);
        assert!(done.wall >= Duration::from_millis(100));
    }

    #[test]
    fn a_failing_program_is_an_error_with_its_words() {
        let e = run(Command::new("bash").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(e.to_string().contains("why"), "{e}");
    }
}
