//! The cluster's CIB, through Pacemaker's own tools: read with `cibadmin`, changed with a patch that names objects by id.
//!
//! A patch without version numbers (`crm_diff --no-version`) touches the named objects only: what others wrote in the
//! meantime (a machine's veto, an operator's `crm resource move`) stays. The whole patch is applied or none of it.
//! With `CIB_file` in the environment the tools work on that file instead, as all of Pacemaker's do.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::xml::Element;

/// The CIB's text.
pub fn query() -> Result<Element> {
    let text = run("cibadmin", &["--query"], &[0])
        .context("reading the cluster's configuration (does the cluster run on this node, and are you root?)")?;
    Element::parse(&text).context("reading what cibadmin printed")
}

/// Make `wanted` out of `current`. Says whether there was anything to do.
pub fn apply(current: &Element, wanted: &Element) -> Result<bool> {
    let scratch = Scratch::new()?;
    let (old, new, patch) = (scratch.file("old.xml"), scratch.file("new.xml"), scratch.file("patch.xml"));
    fs::write(&old, current.to_string()).with_context(|| format!("writing {old}"))?;
    fs::write(&new, wanted.to_string()).with_context(|| format!("writing {new}"))?;
    // crm_diff's exit status: 0 the same, 1 different.
    let text = run("crm_diff", &["--original", &old, "--new", &new, "--no-version"], &[0, 1])?;
    if text.trim().is_empty() {
        return Ok(false);
    }
    fs::write(&patch, text).with_context(|| format!("writing {patch}"))?;
    run("cibadmin", &["--patch", "--xml-file", &patch], &[0]).context("changing the cluster's configuration")?;
    Ok(true)
}

fn run(program: &str, arguments: &[&str], good: &[i32]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| {
        format!("running {program}, one of Pacemaker's command line tools (package pacemaker-cli-utils)")
    })?;
    let code = output.status.code();
    if !code.is_some_and(|code| good.contains(&code)) {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {}", output.status, why.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed something that is not UTF-8"))
}

/// A directory of our own that goes away.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        for attempt in 0..100 {
            let dir = std::env::temp_dir().join(format!("understudy-crm.{}.{attempt}", std::process::id()));
            // Fails if it exists: nobody else's directory or link is used.
            match fs::DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => return Ok(Self(dir)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("creating {}", dir.display())),
            }
        }
        bail!("cannot create a temporary directory in {}", std::env::temp_dir().display())
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A CIB that can be merged into.
pub fn ensure_cib(cib: &Element) -> Result<()> {
    ensure!(
        cib.name == "cib" && cib.child("configuration").is_some(),
        "the cluster's configuration has no <configuration>"
    );
    Ok(())
}
