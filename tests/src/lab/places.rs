//! Where the lab keeps its things.
//!
//! Two kinds of place: the *lab directory* (`target/lab`: what is worth keeping between runs, such as the Debian root) and
//! the *run directory* (`/run/understudy-lab`: sockets and the nodes' disks of the lab that is up). Inside the lab VM
//! both exist too; the VM's first process says where through the environment.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// Overrides the lab directory.
pub const ENV_LAB_DIR: &str = "UNDERSTUDY_LAB_DIR";
/// Overrides the directory with the executables that nodes get under `/usr/libexec/understudy`.
pub const ENV_BIN_DIR: &str = "UNDERSTUDY_BIN_DIR";
/// Set inside the lab VM.
pub const ENV_IN_VM: &str = "UNDERSTUDY_IN_LAB_VM";
/// Where nodes find the executables.
pub const NODE_BIN_DIR: &str = "/usr/libexec/understudy";
/// Directory of the simulated BMC's socket, the same path outside and inside nodes.
pub const BMC_DIR: &str = "/run/understudy-bmc";

/// The lab directory: `UNDERSTUDY_LAB_DIR`, or `target/lab` of the workspace that the current directory is in.
pub fn lab_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(ENV_LAB_DIR) {
        return Ok(PathBuf::from(dir));
    }
    match workspace_dir() {
        Some(workspace) => Ok(workspace.join("target/lab")),
        None => anyhow::bail!("not inside the Understudy workspace: run this there, or set {ENV_LAB_DIR}"),
    }
}

/// The workspace that the current directory is in.
pub fn workspace_dir() -> Option<PathBuf> {
    let here = std::env::current_dir().ok()?;
    here.ancestors().find(|d| d.join("Cargo.lock").exists() && d.join("tests/src/lab").is_dir()).map(Path::to_path_buf)
}

/// The directory with the executables of this build: `UNDERSTUDY_BIN_DIR`, or where this executable is.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(ENV_BIN_DIR) {
        return Ok(PathBuf::from(dir));
    }
    let exe = std::env::current_exe().context("finding this executable")?;
    Ok(exe.parent().unwrap_or(Path::new("/")).to_path_buf())
}

/// The Debian root that nodes are made from.
pub fn root_dir() -> Result<PathBuf> {
    Ok(lab_dir()?.join("root"))
}

/// The run directory of the cluster lab.
pub fn run_dir() -> PathBuf {
    PathBuf::from("/run/understudy-lab")
}

/// Files worth reading afterwards: the event log, every node's logs.
pub fn out_dir() -> Result<PathBuf> {
    Ok(lab_dir()?.join("out"))
}

/// The control socket of the lab's daemon (the simulated BMC).
pub fn bmc_socket() -> PathBuf {
    Path::new(BMC_DIR).join("bmc.sock")
}

/// Whether this process runs inside the lab VM.
pub fn in_vm() -> bool {
    std::env::var_os(ENV_IN_VM).is_some()
}

/// Wall clock in milliseconds since 1970: the one time scale of all logs of the lab.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
