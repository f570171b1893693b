//! How much code there is, by crate.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// Lines of Rust in one crate. Blank lines do not count; comments do, they are written and read too.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Lines {
    /// Outside tests.
    pub code: usize,
    /// In `#[cfg(test)]` modules, which stand at the end of a file here, and below `tests/`.
    pub tests: usize,
    /// Files.
    pub files: usize,
}

/// Count all crates of the workspace.
pub fn count(workspace: &Path) -> Result<BTreeMap<String, Lines>> {
    let mut crates = BTreeMap::new();
    for entry in fs::read_dir(workspace).with_context(|| format!("reading {}", workspace.display()))? {
        let dir = entry?.path();
        if !dir.join("Cargo.toml").exists() {
            continue;
        }
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut lines = Lines::default();
        walk(&dir.join("src"), false, &mut lines)?;
        walk(&dir.join("tests"), true, &mut lines)?;
        walk(&dir.join("guest/src"), false, &mut lines)?;
        crates.insert(name, lines);
    }
    Ok(crates)
}

fn walk(dir: &Path, tests: bool, lines: &mut Lines) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, tests, lines)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let (code, test) = split(&text);
            lines.files += 1;
            if tests || path.file_name().is_some_and(|n| n == "tests.rs") {
                lines.tests += code + test;
            } else {
                lines.code += code;
                lines.tests += test;
            }
        }
    }
    Ok(())
}

fn split(text: &str) -> (usize, usize) {
    let filled = |part: &str| part.lines().filter(|l| !l.trim().is_empty()).count();
    match text.find("\n#[cfg(test)]\nmod tests {") {
        Some(at) => (filled(&text[..at]), filled(&text[at..])),
        None => (filled(text), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_at_the_end_of_a_file_are_counted_apart() {
        assert_eq!(split("fn a() {}\n\nfn b() {}\n#[cfg(test)]\nmod tests {\n}\n"), (2, 3));
        assert_eq!(split("fn a() {}\n"), (1, 0));
    }
}
