//! The cluster's CIB, through Pacemaker's own tools: read with `cibadmin`, changed with a patch that names objects by id.
//!
//! A patch without version numbers (`crm_diff --no-version`) touches the named objects only: what others wrote in the
//! meantime (a machine's veto, an operator's `crm resource move`) stays. The whole patch is applied or none of it.
//! With `CIB_file` in the environment the tools work on that file instead, as all of Pacemaker's do.

use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::xml::Element;

/// `CRM_EX_OLD`: the patch is for an older configuration than there is (tried with 3.0.0: a different `num_updates` is enough).
const OLD: i32 = 103;

/// The CIB's text.
pub fn query() -> Result<Element> {
    let text = run("cibadmin", &["--query"], &[0])
        .context("reading the cluster's configuration (does the cluster run on this node, and are you root?)")?;
    Element::parse(&text).context("reading what cibadmin printed")
}

/// Make `wanted` out of `current`. Says whether there was anything to do.
pub fn apply(current: &Element, wanted: &Element) -> Result<bool> {
    let scratch = Scratch::new()?;
    let Some(file) = patch(&scratch, current, wanted, &["--no-version"])? else { return Ok(false) };
    run("cibadmin", &["--patch", "--xml-file", &file], &[0]).context("changing the cluster's configuration")?;
    Ok(true)
}

/// What became of a change that was to be made only if nothing else had changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swapped {
    /// It is made.
    Done,
    /// The cluster is not what it was when it was read; nothing was changed.
    Stale,
}

/// Make `wanted` out of `current`, only if the cluster's CIB is still that, status included, to the last update.
pub fn apply_if_unchanged(current: &Element, wanted: &Element) -> Result<Swapped> {
    let mut wanted = wanted.clone();
    let epoch: u64 = current.attribute("epoch").and_then(|e| e.parse().ok()).context("the CIB has no epoch")?;
    wanted.set("epoch", &(epoch + 1).to_string());
    wanted.set("num_updates", "0");
    let scratch = Scratch::new()?;
    let Some(file) = patch(&scratch, current, &wanted, &[])? else { return Ok(Swapped::Done) };
    let output = tool("cibadmin", &["--patch", "--xml-file", &file])?;
    match output.status.code() {
        Some(0) => Ok(Swapped::Done),
        Some(OLD) => Ok(Swapped::Stale),
        _ => Err(failed("cibadmin", &output)).context("changing the cluster's configuration"),
    }
}

/// A patch as a file; `None` if nothing differs.
fn patch(scratch: &Scratch, current: &Element, wanted: &Element, options: &[&str]) -> Result<Option<String>> {
    let (old, new, patch) = (scratch.file("old.xml"), scratch.file("new.xml"), scratch.file("patch.xml"));
    fs::write(&old, current.to_string()).with_context(|| format!("writing {old}"))?;
    fs::write(&new, wanted.to_string()).with_context(|| format!("writing {new}"))?;
    // crm_diff's exit status: 0 the same, 1 different.
    let text = run("crm_diff", &[&["--original", &old, "--new", &new], options].concat(), &[0, 1])?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    fs::write(&patch, text).with_context(|| format!("writing {patch}"))?;
    Ok(Some(patch))
}

/// How the cluster's own status tool sees a CIB: `crm_mon`'s XML of its nodes and resources. The same reading of it, not a later one.
pub fn status(cib: &Element) -> Result<Element> {
    let scratch = Scratch::new()?;
    let file = scratch.file("cib.xml");
    fs::write(&file, cib.to_string()).with_context(|| format!("writing {file}"))?;
    let file = format!("--xml-file={file}");
    let options = [file.as_str(), "--one-shot", "--output-as=xml", "--include=none,nodes,resources"];
    let text = run("crm_mon", &options, &[0]).context("asking crm_mon what the configuration's status means")?;
    Element::parse(&text).context("reading what crm_mon printed")
}

fn run(program: &str, arguments: &[&str], good: &[i32]) -> Result<String> {
    let output = tool(program, arguments)?;
    if !output.status.code().is_some_and(|code| good.contains(&code)) {
        return Err(failed(program, &output));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed something that is not UTF-8"))
}

fn tool(program: &str, arguments: &[&str]) -> Result<Output> {
    Command::new(program).args(arguments).output().with_context(|| {
        format!("running {program}, one of Pacemaker's command line tools (package pacemaker-cli-utils)")
    })
}

fn failed(program: &str, output: &Output) -> anyhow::Error {
    anyhow!("{program} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim())
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
