//! `lazyimg store roots`, `rotate-root`, `acknowledge`, `gc` and `stats`.

use serde_json::{Value, json};

use super::client::Admin;
use crate::args::{Global, StoreAcknowledge, StoreAct, StoreGc, StoreQuery};
use crate::cmd::block_on;
use crate::exit::Error;
use crate::output::{self, bytes, percent};

/// Shows the roots.
pub fn roots(args: &StoreQuery) -> Result<(), Error> {
    let admin = Admin::new(&args.at)?;
    let roots = block_on(admin.get("/v1/admin/roots"))?;
    match args.json {
        true => output::json(&roots),
        false => output::data(&roots_text(&roots)),
    }
}

fn roots_text(roots: &Value) -> String {
    let line = |root: &Value| {
        let mut line = format!("{}  {:8}", word(&root["root"]), word(&root["state"]));
        if let Some(since) = root["since"].as_u64() {
            line += &format!("  for {}", ago(since));
        }
        if let Some(at) = root["alarm"]["at"].as_u64() {
            line += &format!(
                "  ALARM {} ago: {} read {}",
                ago(at),
                word(&root["alarm"]["tenant"]),
                word(&root["alarm"]["chunk"])
            );
        }
        if root["alarms_ignored"].is_u64() {
            line += "  (alarms do not keep it)";
        }
        line + "\n"
    };
    list(roots).map(line).collect()
}

/// Begins a new root.
pub fn rotate(global: &Global, args: &StoreAct) -> Result<(), Error> {
    let admin = Admin::new(&args.at)?;
    let done = block_on(admin.post("/v1/admin/roots/rotate"))?;
    if args.json {
        return output::json(&done);
    }
    output::say(
        global,
        "a new root takes what is put; `lazyimg store gc` moves what lives out of the old one",
    );
    output::data(&word(&done["root"]))
}

/// Acknowledges an alarm.
pub fn acknowledge(global: &Global, args: &StoreAcknowledge) -> Result<(), Error> {
    let admin = Admin::new(&args.at)?;
    let path = format!("/v1/admin/roots/{}/acknowledge", args.root);
    let mut text = format!("acknowledged; the grace time of {} begins anew", args.root);
    if args.ignore_alarms {
        block_on(admin.post_and_wait(&path, json!({"ignore_alarms": true})))?;
        text += ", and no further alarm keeps it";
    } else {
        block_on(admin.post(&path))?;
    }
    output::say(global, &text);
    Ok(())
}

/// Collects garbage.
pub fn gc(global: &Global, args: &StoreGc) -> Result<(), Error> {
    let admin = Admin::new(&args.at)?;
    let options = json!({
        "dry_run": args.dry_run,
        "grace_seconds": args.grace.map(|d| d.as_secs()),
        "unused_seconds": args.unused.map(|d| d.as_secs()),
    });
    let waiting = output::spinner(global, "collecting garbage");
    let report = block_on(admin.post_and_wait("/v1/admin/gc", options))?;
    waiting.finish_and_clear();
    match args.json {
        true => output::json(&report)?,
        false => output::data(&gc_text(&report))?,
    }
    match failed(&report) {
        0 => Ok(()),
        roots => Err(Error::Other(format!(
            "{roots} roots could not be collected; the report and the store's log say why"
        ))),
    }
}

/// How many roots a pass could not do all with that it should.
fn failed(report: &Value) -> usize {
    let roots = list(&report["roots"]);
    roots.filter(|root| root["error"].is_string()).count()
}

fn gc_text(report: &Value) -> String {
    let mut text = String::new();
    if report["dry_run"] == true {
        text += "nothing was changed; this would be done:\n";
    }
    for root in list(&report["roots"]) {
        text += &format!(
            "{}  {} -> {}: {} manifests moved, {} dropped; {} chunks copied ({})",
            word(&root["root"]),
            word(&root["before"]),
            root["after"].as_str().unwrap_or("gone"),
            number(&root["manifests_moved"]),
            number(&root["manifests_dropped"]),
            number(&root["chunks_copied"]),
            bytes(number(&root["bytes_copied"])),
        );
        if root["alarm"] == true {
            text += "; an ALARM stops its deletion: `lazyimg store roots`, then `acknowledge`";
        }
        let wait = number(&root["wait_seconds"]);
        if wait > 0 {
            text += &format!("; next step in {}", span(wait));
        }
        text += "\n";
        if root["error"].is_string() {
            text += &format!("  FAILED: {}\n", word(&root["error"]));
        }
        for stuck in list(&root["stuck"]) {
            text += &format!(
                "  STUCK {} of {} (key {}): {} chunks are gone or damaged; convert the image again, or delete it\n",
                word(&stuck["image"]),
                word(&stuck["tenant"]),
                word(&stuck["key"]),
                number(&stuck["chunks"]),
            );
        }
    }
    if list(&report["roots"]).next().is_none() {
        text += "there is only the active root: `lazyimg store rotate-root` begins a new one\n";
    }
    text
}

/// Shows what the store holds.
pub fn stats(args: &StoreQuery) -> Result<(), Error> {
    let admin = Admin::new(&args.at)?;
    let stats = block_on(admin.get("/v1/admin/stats"))?;
    match args.json {
        true => output::json(&stats),
        false => output::data(&stats_text(&stats)),
    }
}

fn stats_text(stats: &Value) -> String {
    let mut text = format!("engine     {}", word(&stats["engine"]));
    if let Some(used) = stats["engine_bytes"].as_u64() {
        text += &format!(", {} used", bytes(used));
    }
    text += "\n";
    for root in list(&stats["roots"]) {
        text += &format!(
            "root       {}  {:8}  {}{} chunks, {}; {} images{}\n",
            word(&root["root"]),
            word(&root["state"]),
            if root["counted_all"] == false {
                "more than "
            } else {
                ""
            },
            number(&root["chunks"]),
            bytes(number(&root["chunk_bytes"])),
            number(&root["images"]),
            if root["alarm"].is_null() {
                ""
            } else {
                "; ALARM"
            },
        );
    }
    for tenant in list(&stats["tenants"]) {
        let used = number(&tenant["bytes"]);
        text += &format!("tenant     {}  {}", word(&tenant["tenant"]), bytes(used));
        if let Some(quota) = tenant["quota"].as_u64() {
            text += &format!(" of {} ({})", bytes(quota), percent(used, quota));
        }
        text += "\n";
    }
    text
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// What a store says goes to a terminal: nothing in it may be more than text.
fn word(value: &Value) -> String {
    let text = value.as_str().unwrap_or("?");
    text.chars().filter(|c| !c.is_control()).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// How long ago a second since 1970 was.
fn ago(then: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    span(now.map_or(0, |now| now.as_secs().saturating_sub(then)))
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_stops_a_root_from_going() {
        let report = json!({"dry_run": true, "roots": [{
            "root": "r00000001", "before": "retired", "after": "retired", "alarm": true,
            "wait_seconds": 7200, "manifests_moved": 2, "manifests_dropped": 0,
            "chunks_copied": 3, "bytes_copied": 1500,
            "error": "a document is damaged",
            "stuck": [{"tenant": "a", "image": "sha256:00", "key": "0123", "chunks": 4}],
        }]});
        let text = gc_text(&report);
        assert_eq!(failed(&report), 1);
        for word in [
            "nothing was changed",
            "ALARM",
            "1.5 kB",
            "2 h",
            "FAILED: a document",
            "STUCK",
            "4 chunks",
        ] {
            assert!(text.contains(word), "{word} is not in: {text}");
        }
        assert!(gc_text(&json!({"roots": []})).contains("rotate-root"));
    }

    #[test]
    fn what_a_store_says_can_not_steer_the_terminal() {
        let stats = json!({"engine": "x\u{1b}[2J", "tenants": [{"tenant": "t\n", "bytes": 5, "quota": 10}]});
        let text = stats_text(&stats);
        assert!(
            !text.contains('\u{1b}') && text.contains("50.0 %"),
            "{text:?}"
        );
    }
}
