//! Which credentials would be used: names of files and programs, never what they hold.

use std::path::Path;

use lazyimg_image::credentials::{self, Found};

use super::{Check, State, check, find_program};

const WHAT: &str = "credentials";

pub fn check_credentials(docker_config: Option<&Path>) -> Check {
    let files = match credentials::found(docker_config) {
        Ok(files) => files,
        Err(e) => {
            let advice = "correct or remove the file: no registry can be asked with it as it is";
            return check(WHAT, State::Fail, crate::exit::chain(&e), advice);
        }
    };
    if files.is_empty() {
        let finding = "none: registries are asked anonymously";
        return check(WHAT, State::Ok, finding, "");
    }
    let told: Vec<String> = files.iter().map(words).collect();
    let mut missing: Vec<&str> = files
        .iter()
        .flat_map(|f| &f.helpers)
        .map(|(_, program)| program.as_str())
        .filter(|program| find_program(program).is_none())
        .collect();
    missing.dedup();
    if missing.is_empty() {
        return check(WHAT, State::Ok, told.join("; "), "");
    }
    let advice = format!(
        "not in PATH: {}; install what is missing, or take it out of the file",
        missing.join(", ")
    );
    check(WHAT, State::Note, told.join("; "), &advice)
}

fn words(file: &Found) -> String {
    let mut parts = Vec::new();
    if !file.registries.is_empty() {
        parts.push(format!("for {}", file.registries.join(", ")));
    }
    for (registry, program) in &file.helpers {
        let registry = registry.as_deref().unwrap_or("all others");
        parts.push(format!("{program} for {registry}"));
    }
    if parts.is_empty() {
        parts.push("names no registry".into());
    }
    format!("{}: {}", file.path.display(), parts.join(", "))
}
