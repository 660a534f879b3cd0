//! Data on standard output, words on standard error, bars on a terminal.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Global;
use crate::exit::Error;

/// Writes data to standard output.
///
/// # Errors
/// When the reader went away or the disk is full.
pub fn data(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| {
            if text.ends_with('\n') {
                Ok(())
            } else {
                out.write_all(b"\n")
            }
        })
        .and_then(|()| out.flush())
        .map_err(Error::io("standard output"))
}

/// Writes a value as one JSON document to standard output.
///
/// # Errors
/// When the reader went away or the disk is full.
pub fn json(value: &impl serde::Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Other(e.to_string()))?;
    data(&text)
}

/// Words for a person, on standard error, unless `--quiet`.
pub fn say(global: &Global, text: &str) {
    if !global.quiet {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// What is done within this time needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a bar is drawn at least: it shows that something is alive.
const TICK: Duration = Duration::from_millis(200);

/// A bar over bytes: shown after a second, on a terminal, unless `--quiet`. Gone when dropped.
pub fn byte_bar(global: &Global, total: u64, what: &'static str) -> ProgressBar {
    let template =
        "{msg:14} {bar:32} {bytes:>10} of {total_bytes:10} {bytes_per_sec:>12}  {eta} left";
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
    later(global, styled(bar, template, what))
}

/// A bar over things that are counted, as [`byte_bar`]; how many is told later.
pub fn count_bar(global: &Global, what: &'static str) -> ProgressBar {
    let template = "{msg:14} {bar:32} {pos:>8} of {len:8} chunks  {eta} left";
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
    later(global, styled(bar, template, what))
}

/// Words with a sign of life, for what tells no steps: shown after a second, on a terminal, unless
/// `--quiet`. Gone when dropped.
pub fn spinner(global: &Global, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    later(global, to_spinner(bar, what))
}

/// Makes a bar one that tells no steps any more.
pub fn to_spinner(bar: ProgressBar, what: &'static str) -> ProgressBar {
    styled(bar, "{spinner} {msg} ({elapsed})", what)
}

fn styled(bar: ProgressBar, template: &str, what: &'static str) -> ProgressBar {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}

/// Shows a hidden bar once the patience is over, if somebody still holds it then.
fn later(global: &Global, bar: ProgressBar) -> ProgressBar {
    if global.quiet || !std::io::stderr().is_terminal() {
        return bar;
    }
    let held = bar.downgrade();
    // Without the thread there is no bar, and nothing else is lost.
    let _ = std::thread::Builder::new()
        .name("lazyimg-bar".to_owned())
        .spawn(move || {
            std::thread::sleep(PATIENCE);
            if let Some(bar) = held.upgrade().filter(|bar| !bar.is_finished()) {
                bar.set_draw_target(ProgressDrawTarget::stderr());
                bar.enable_steady_tick(TICK);
            }
        });
    bar
}

/// Bytes for people: three digits and a decimal unit.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 1 };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// `part` of `whole` in per cent.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "–".into();
    }
    format!("{:.1} %", part as f64 * 100.0 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_with_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_500), "1.5 kB");
        assert_eq!(bytes(123_456_789), "123 MB");
        assert_eq!(percent(1, 8), "12.5 %");
    }
}
