//! Where the programs are that the agents start: beside the agents' own executable, or in `PATH`.

use std::path::PathBuf;

use ocf::command;
use ocf::{Environment, Failure};

/// Path of one of our programs.
pub fn locate(env: &Environment, program: &str) -> Result<PathBuf, Failure> {
    if !env.pretend_binaries_missing() {
        // The agents are reached through links; the kernel knows the file behind them.
        let beside = std::env::current_exe().ok().and_then(|me| Some(me.parent()?.join(program)));
        if let Some(path) = beside.filter(|p| command::is_executable(p)) {
            return Ok(path);
        }
    }
    command::find(env, program).ok_or_else(|| {
        Failure::not_installed(format!(
            "{program} is not installed on this node: neither beside understudy-ocf nor in PATH"
        ))
    })
}
