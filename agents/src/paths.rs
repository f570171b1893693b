//! The parameters that say which machine it is and where its files are, common to `vmm` and `replicator`.

use ocf::parameter::{Param, Parameters};
use understudy_protocol::layout::{DEFAULT_RUN_ROOT, DEFAULT_SHM_ROOT, Layout, valid_machine_name};

/// The machine.
pub static NAME: Param<String> = Param::text("name")
    .required()
    .unique_group("machine")
    .check(machine_name)
    .short("Machine name")
    .long(
        "Name of the protected machine: 1 to 63 letters, digits, '-' and '_', starting with a letter or digit. The vmm and the \
         replicator of one machine have the same name; it names their directories, the node attribute that counts takeovers \
         and the constraint that carries a veto.",
    );

/// Sockets, pid files, logs.
pub static RUN_ROOT: Param<String> = Param::text("run_root")
    .default(DEFAULT_RUN_ROOT)
    .check(absolute)
    .short("Parent of run directories")
    .long("Directory below which each machine has one for sockets, pid files and logs. Must vanish when the node reboots (a tmpfs).");

/// RAM, arena, image.
pub static SHM_ROOT: Param<String> = Param::text("shm_root")
    .default(DEFAULT_SHM_ROOT)
    .check(absolute)
    .short("Parent of shared-memory directories")
    .long(
        "Directory below which each machine has one for guest RAM, capture arena and the standby's image. Must be a tmpfs with \
         room for the machine's memory, the arena and two checkpoints.",
    );

/// A machine's name.
pub fn machine_name(value: &str) -> Result<(), String> {
    if valid_machine_name(value) {
        return Ok(());
    }
    Err(format!("is \"{value}\": use 1 to 63 letters, digits, '-' and '_', starting with a letter or digit"))
}

/// A path that does not depend on where the agent is started.
pub fn absolute(value: &str) -> Result<(), String> {
    if value.starts_with('/') { Ok(()) } else { Err(format!("is \"{value}\", which is not an absolute path")) }
}

/// Where the machine's files are.
pub fn layout(parameters: &Parameters) -> ocf::Result<(String, Layout)> {
    let name = parameters.get(&NAME)?;
    let layout = Layout::new(parameters.get(&RUN_ROOT)?, parameters.get(&SHM_ROOT)?, &name);
    Ok((name, layout))
}
