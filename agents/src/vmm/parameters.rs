//! Parameters of `ocf:understudy:vmm`, and the command line that they become.

use ocf::parameter::{Declaration, Param, Parameters};
use std::time::Duration;
use understudy_protocol::cdrom;
use understudy_protocol::disk::parse_list;
use understudy_protocol::ids::Generation;
use understudy_protocol::key::DEFAULT_KEY_FILE;
use understudy_protocol::nic;

use crate::paths::{NAME, RUN_ROOT, SHM_ROOT, absolute};

/// How the resource is configured.
pub static MODE: Param<String> = Param::choice("mode", &["auto", "promotable", "primitive"])
    .default("auto")
    .short("Promotable clone or plain primitive")
    .long(
        "As a promotable clone, start prepares a standby and promote runs the machine. As a plain primitive, start runs it. \
         auto looks at whether the resource is in a clone; say it outright only where no cluster tells (ocf-tester, by hand).",
    );
/// Guest memory.
pub static MEMORY: Param<u64> = Param::integer("memory", 16, 1 << 22)
    .default("512")
    .short("Guest memory (MiB)")
    .long("Memory of the guest in MiB. The same on every node, or a standby cannot hold the primary's image.");
/// Processors.
pub static VCPUS: Param<u64> = Param::integer("vcpus", 1, 32)
    .default("1")
    .short("Virtual CPUs")
    .long("Number of the guest's CPUs. The same on every node.");
/// Kernel.
pub static KERNEL: Param<String> = Param::text("kernel")
    .required()
    .check(absolute)
    .short("Kernel image")
    .long("Linux kernel (bzImage) that the machine boots. Must be the same file content on every node.");
/// Initial RAM disk.
pub static INITRD: Param<String> = Param::text("initrd")
    .check(absolute)
    .short("Initial RAM disk")
    .long("Initial RAM disk of the kernel, if it needs one. Must be the same file content on every node.");
/// Kernel command line.
pub static CMDLINE: Param<String> =
    Param::text("cmdline").short("Kernel command line").long("Command line of the guest's kernel.");
/// COM1.
pub static SERIAL0: Param<String> = Param::text("serial0").short("COM1").long(
    "What is behind the guest's first serial port: board:HOST:PORT/DEVICE,key=FILE for a line of an interface board, file:PATH, pty or \
     none.",
);
/// COM2.
pub static SERIAL1: Param<String> =
    Param::text("serial1").short("COM2").long("What is behind the guest's second serial port; as serial0.");
/// virtio console.
pub static CONSOLE: Param<String> = Param::text("console")
    .short("virtio console")
    .long("What is behind the guest's virtio console: file:PATH. Not set: there is none.");
/// Disks.
pub static DISKS: Param<String> = Param::text("disks").check(disks).short("Disks").long(
    "The guest's disks, one a line or separated by semicolons: name=NAME,file=PATH,format=raw|qcow2[,bus=virtio|scsi][,slices=DIRECTORY][,mode=shared|mirrored][,queues=N][,cache=none|writeback][,aio=auto|io_uring|threads][,readonly]; \
     PATH may be iscsi://HOST[:PORT]/TARGET/LUN, then with slices and, for CHAP, chap=FILE. \
     PATH is a file or a block device that every node sees as the same one; NAME is what status and guest call it; DIRECTORY (default: PATH.row, and to be said \
     for a block device) is where a protected machine's writes wait until their checkpoint is committed, on a file system that every node sees, with locks that \
     work between nodes. Of a mirrored disk each node has its own file and directory, and sees nobody else's. The same on every node. A machine with disks cannot be migrated live yet.",
);
/// Whether the list can be a machine's.
fn disks(value: &str) -> Result<(), String> {
    parse_list(value).map(drop).map_err(|e| e.to_string())
}
/// CD-ROM drives.
pub static CDROMS: Param<String> = Param::text("cdroms").check(cdroms).short("CD-ROM drives").long(
    "The guest's CD-ROM drives, one a line or separated by semicolons: name=NAME[,file=PATH]. PATH is an ISO image that lies in the drive when the machine is \
     switched on; the same file on every node. What lies in it later (understudy-vmm insert, eject) is part of the machine's state; if a node does not have \
     that file the drive is empty there after a takeover.",
);
/// Whether the list can be a machine's.
fn cdroms(value: &str) -> Result<(), String> {
    cdrom::parse_list(value).map(drop).map_err(|e| e.to_string())
}
/// Network cards.
pub static NICS: Param<String> = Param::text("nics").check(nics).short("Network cards").long(
    "The guest's network cards, one a line or separated by semicolons: name=NAME,tap=INTERFACE[,bridge=BRIDGE]|macvtap=INTERFACE[,mac=52:54:00:12:34:56][,queues=N][,mtu=N]\
     [,hold=BYTES][,at-bound=wait|drop][,spoof=allow|deny][,addresses=IP+IP][,vlan=ID][,rate-out=BYTES][,rate-in=BYTES][,burst=BYTES][,storm=N]. \
     A tap that is not there is made and put into the bridge, which every node must have under this name. Without mac the address follows from the machine's and the \
     card's name. hold and at-bound: how much may wait for checkpoints, and whether the guest waits then or packets are dropped. spoof=deny: the guest sends from \
     its card's address only; addresses: and says only that it is these. vlan: tagged towards the bridge, untagged to the guest. Rates are bytes a second with \
     K, M or G; storm: broadcasts, multicasts and packets to unknown addresses a second, of each. The same on every node.",
);
/// Whether the list can be a machine's.
fn nics(value: &str) -> Result<(), String> {
    nic::parse_list(value).map(drop).map_err(|e| e.to_string())
}
/// The network cards of a configuration.
pub fn cards(p: &Parameters) -> ocf::Result<Vec<nic::NicSpec>> {
    nic::parse_list(&p.find(&NICS)?.unwrap_or_default())
        .map_err(|e| ocf::Failure::arguments(format!("parameter nics: {e}")))
}
/// Watchdog.
pub static WATCHDOG: Param<String> =
    Param::choice("watchdog", &["none", "i6300esb"]).default("none").short("Watchdog").long(
        "A watchdog that the guest can arm and then has to feed: i6300esb (PCI; Linux has the module of this name; RuntimeWatchdogSec= of systemd or the \
         watchdog daemon feeds it). Its time is the guest's: it stands still while the machine is paused or taken over. The monitors take it for the guest's \
         heartbeat. The same on every node.",
    );
/// What follows when the guest does not feed it.
pub static WATCHDOG_ACTION: Param<String> = Param::choice("watchdog_action", &["reset", "restart", "report"])
    .default("reset")
    .short("When the guest does not feed it")
    .long(
        "reset: the machine is reset where it is, and a protected one stays protected. restart: monitor fails while the guest hangs, and the cluster starts \
         the machine again, after too many failures elsewhere; not for a promotable clone, because a guest that hangs hangs in its standby's image too. \
         report: status and monitors say it, and nothing else happens.",
    );
/// What the machine's parameters say of its watchdog. `promotable`: it is a clone with roles.
pub fn check_watchdog(p: &Parameters, promotable: bool) -> ocf::Result {
    let (model, action) = (p.get(&WATCHDOG)?, p.get(&WATCHDOG_ACTION)?);
    if promotable && model != "none" && action == "restart" {
        return Err(ocf::Failure::arguments(
            "parameter watchdog_action is \"restart\", and the machine is a promotable clone: its standby would go on with a guest that hangs; use reset",
        ));
    }
    Ok(())
}
/// Whether the cluster is to start the machine again when its guest hangs.
pub fn restarts_hung_guests(p: &Parameters) -> bool {
    p.get(&WATCHDOG_ACTION).is_ok_and(|action| action == "restart")
}
/// Capture strategy.
pub static CAPTURE: Param<String> = Param::choice("capture", &["auto", "stop", "lock", "validate"])
    .default("auto")
    .short("How checkpoints are captured")
    .long(
        "stop: pages are copied while the guest stands still. lock: they are write-protected and copied while it runs on; a write to one \
         waits for its copy. validate: they are copied while it runs on, and copies of pages that were written meanwhile do not count. \
         auto: chosen at every checkpoint from costs measured on this host.",
    );
/// Capture arena.
pub static ARENA: Param<u64> = Param::integer("arena", 1, 1 << 20).short("Capture arena (MiB)").long(
    "Size in MiB of the shared memory that a checkpoint is captured into. What does not fit makes the pause longer. Not set: \
     chosen by the VMM.",
);
/// How the guest is shut down.
pub static SHUTDOWN_MODE: Param<String> =
    Param::choice("shutdown_mode", &["acpi", "off"]).default("acpi").reloadable().short("How the guest is shut down").long(
        "What happens to the guest when the machine is stopped and nobody takes it over: acpi presses the power button and gives \
         the guest until shortly before the operation's timeout (which has to suit the guest); off switches it off at once.",
    );
/// Degraded exit codes.
pub static REPORT_DEGRADED: Param<bool> =
    Param::boolean("report_degraded").default("false").reloadable().short("Report degraded states").long(
        "Let monitor answer 190 or 191 (degraded) instead of 0 or 8 while the machine is paused, or has been unprotected for \
         longer than unprotected_after. The cluster treats them as running and shows them; some tools do not know them.",
    );
/// When unprotected becomes degraded.
pub static UNPROTECTED_AFTER: Param<Duration> =
    Param::time("unprotected_after").default("60s").reloadable().short("Unprotected is degraded after").long(
        "With report_degraded: how long the running machine may have been without a complete standby before that is reported.",
    );

/// Load sharing by priority.
pub static LOAD_SHARING: Param<String> =
    Param::choice("load_sharing", &["off", "pause"]).default("off").reloadable().short("Load sharing by priority").long(
        "pause: where the vCPUs of the machines that run on a node are more than its processors (host_room), those of lower priority are \
         paused, until there is room again. A paused machine is reported as degraded, not as failed, and keeps its memory; a machine whose \
         memory does not fit is not started. off: the machine neither pauses others nor is paused, and is not counted.",
    );
/// Who is paused for whom.
pub static PRIORITY: Param<u64> =
    Param::integer("priority", 0, 10_000).default("0").reloadable().short("Priority in load sharing").long(
        "With load_sharing=pause: machines of lower priority are paused for this one where processors are short. The meta attribute \
         priority is Pacemaker's own: where memory is short, it stops machines of lower priority.",
    );
/// What nodes have for machines.
pub static HOST_ROOM: Param<String> = Param::text("host_room").check(host_room).reloadable().short("What nodes have for machines").long(
    "With load_sharing=pause: NODE=CPUS or NODE=CPUS/MIB for each node, separated by blanks. A node that is not named has the processors \
     that it has, and no limit of memory.",
);
fn host_room(value: &str) -> Result<(), String> {
    crate::sharing::rooms(value).map(drop)
}

/// Where machines are received.
pub static MIGRATION_PEERS: Param<String> =
    Param::text("migration_peers").check(crate::replicator::peers).reloadable().short("Where nodes receive migrations").long(
        "For a plain primitive with allow-migrate=true: one NODE=HOST:PORT for each node, separated by blanks, the same as the parameter \
         peers of ocf:understudy:migrations.",
    );
/// Key.
pub static MIGRATION_KEY: Param<String> = Param::text("migration_key")
    .default(DEFAULT_KEY_FILE)
    .check(absolute)
    .reloadable()
    .short("Key file for migrations")
    .long("File with the key that the nodes know each other by; the same as the parameter key of ocf:understudy:migrations.");
/// How long the last copy may take.
pub static MIGRATION_PAUSE_MS: Param<u64> = Param::integer("migration_pause_ms", 1, 60_000)
    .default("500")
    .reloadable()
    .short("Longest last copy (ms)")
    .long(
        "How long the last copy of a migration may stop the machine; what it takes the cluster to let it run on the other node comes on \
         top. A machine that writes its memory faster than it can be sent is slowed down, and stays where it is if that does not help.",
    );

/// How a VMM is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Build the machine and wait.
    Standby,
    /// Boot it at once, under this generation.
    Boot(Generation),
}

/// All, in the order in which people should read them.
pub fn declarations() -> Vec<&'static Declaration> {
    vec![
        NAME.declaration(),
        MODE.declaration(),
        MEMORY.declaration(),
        VCPUS.declaration(),
        KERNEL.declaration(),
        INITRD.declaration(),
        CMDLINE.declaration(),
        SERIAL0.declaration(),
        SERIAL1.declaration(),
        CONSOLE.declaration(),
        DISKS.declaration(),
        CDROMS.declaration(),
        NICS.declaration(),
        WATCHDOG.declaration(),
        WATCHDOG_ACTION.declaration(),
        ARENA.declaration(),
        CAPTURE.declaration(),
        SHUTDOWN_MODE.declaration(),
        REPORT_DEGRADED.declaration(),
        UNPROTECTED_AFTER.declaration(),
        LOAD_SHARING.declaration(),
        PRIORITY.declaration(),
        HOST_ROOM.declaration(),
        MIGRATION_PEERS.declaration(),
        MIGRATION_KEY.declaration(),
        MIGRATION_PAUSE_MS.declaration(),
        RUN_ROOT.declaration(),
        SHM_ROOT.declaration(),
    ]
}

/// Arguments of `understudy-vmm` for a standby or a machine that runs at once.
pub fn command_line(p: &Parameters, node: &str, run: Run) -> ocf::Result<Vec<String>> {
    let mut line: Vec<String> = vec!["run".into()];
    let mut option = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            line.push(format!("--{name}"));
            line.push(value);
        }
    };
    option("machine", Some(p.get(&NAME)?));
    option("memory", Some(p.get(&MEMORY)?.to_string()));
    option("vcpus", Some(p.get(&VCPUS)?.to_string()));
    option("kernel", Some(p.get(&KERNEL)?));
    option("initrd", p.find(&INITRD)?);
    option("cmdline", p.find(&CMDLINE)?);
    option("serial0", p.find(&SERIAL0)?);
    option("serial1", p.find(&SERIAL1)?);
    option("console", p.find(&CONSOLE)?);
    let disks = parse_list(&p.find(&DISKS)?.unwrap_or_default())
        .map_err(|e| ocf::Failure::arguments(format!("parameter disks: {e}")))?;
    for disk in &disks {
        option("disk", Some(disk.to_string()));
    }
    let drives = cdrom::parse_list(&p.find(&CDROMS)?.unwrap_or_default())
        .and_then(|drives| cdrom::check_list(&drives, &disks).map(|()| drives))
        .map_err(|e| ocf::Failure::arguments(format!("parameter cdroms: {e}")))?;
    for drive in &drives {
        option("cdrom", Some(drive.to_string()));
    }
    for nic in &cards(p)? {
        option("nic", Some(nic.to_string()));
    }
    let watchdog = Some(p.get(&WATCHDOG)?).filter(|model| model != "none");
    // Restarting is the cluster's: the VMM only has to say that the guest hangs.
    let action = p.get(&WATCHDOG_ACTION)?.replace("restart", "report");
    option("watchdog-action", watchdog.as_ref().map(|_| action));
    option("watchdog", watchdog);
    // It stands in the disks' owner records, and nowhere else.
    option("node", (!disks.is_empty()).then(|| node.to_owned()));
    option("capture", Some(p.get(&CAPTURE)?));
    option("arena", p.find(&ARENA)?.map(|mib| mib.to_string()));
    option("run-root", Some(p.get(&RUN_ROOT)?));
    option("shm-root", Some(p.get(&SHM_ROOT)?));
    match run {
        Run::Standby => line.push("--standby".into()),
        Run::Boot(generation) => line.extend(["--generation".into(), generation.to_string()]),
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use ocf::Environment;

    use super::*;

    fn line(disks: Option<&str>) -> ocf::Result<Vec<String>> {
        let mut pairs = vec![("OCF_RESKEY_name", "m"), ("OCF_RESKEY_kernel", "/k")];
        pairs.extend(disks.map(|disks| ("OCF_RESKEY_disks", disks)));
        let parameters = Parameters::new(Environment::from_pairs(pairs));
        command_line(&parameters, "n1", Run::Standby)
    }

    #[test]
    fn disks_are_handed_on_with_the_nodes_name_and_without_disks_nothing_is() {
        let given = " name=a,format=raw,file=/a ; name=b,file=/b,format=qcow2,queues=2\n";
        let line_ = line(Some(given)).unwrap().join(" ");
        let wanted = "--disk name=a,file=/a,format=raw --disk name=b,file=/b,format=qcow2,queues=2 --node n1 ";
        assert!(line_.contains(wanted), "{line_}");
        let none = line(None).unwrap().join(" ");
        assert!(!none.contains("--disk") && !none.contains("--node"), "{none}");
    }

    #[test]
    fn drives_are_handed_on() {
        let pairs = [
            ("OCF_RESKEY_name", "m"),
            ("OCF_RESKEY_kernel", "/k"),
            ("OCF_RESKEY_disks", "name=a,file=/a,format=raw,bus=scsi"),
            ("OCF_RESKEY_cdroms", "name=cd0,file=/a.iso;name=cd1"),
        ];
        let parameters = Parameters::new(Environment::from_pairs(pairs));
        let line = command_line(&parameters, "n1", Run::Standby).unwrap().join(" ");
        let wanted =
            "--disk name=a,file=/a,format=raw,bus=scsi --cdrom name=cd0,file=/a.iso --cdrom name=cd1 --node n1 ";
        assert!(line.contains(wanted), "{line}");
        assert!(cdroms("name=cd0;name=cd0").unwrap_err().contains("its name"));
    }

    #[test]
    fn network_cards_are_handed_on() {
        let cards = "name=net0,tap=m0,bridge=br0,vlan=12 ; name=net1,tap=m1,rate-out=125M";
        let pairs = [("OCF_RESKEY_name", "m"), ("OCF_RESKEY_kernel", "/k"), ("OCF_RESKEY_nics", cards)];
        let parameters = Parameters::new(Environment::from_pairs(pairs));
        let line = command_line(&parameters, "n1", Run::Standby).unwrap().join(" ");
        let wanted = "--nic name=net0,tap=m0,bridge=br0,vlan=12 --nic name=net1,tap=m1,rate-out=125000000 ";
        assert!(line.contains(wanted), "{line}");
        assert!(nics("name=a,tap=x;name=a,tap=y").unwrap_err().contains("its name"));
    }

    #[test]
    fn a_watchdog_is_handed_on_and_restarting_is_the_clusters() {
        let parameters = |more: &[(&str, &str)]| {
            let mut pairs = vec![("OCF_RESKEY_name", "m"), ("OCF_RESKEY_kernel", "/k")];
            pairs.extend(more);
            Parameters::new(Environment::from_pairs(pairs))
        };
        let line = |p: &Parameters| command_line(p, "n1", Run::Standby).unwrap().join(" ");
        let none = parameters(&[("OCF_RESKEY_watchdog_action", "restart")]);
        assert!(!line(&none).contains("watchdog"), "{}", line(&none));
        assert!(check_watchdog(&none, true).is_ok());
        for (action, told) in [("reset", "reset"), ("report", "report"), ("restart", "report")] {
            let p = parameters(&[("OCF_RESKEY_watchdog", "i6300esb"), ("OCF_RESKEY_watchdog_action", action)]);
            let wanted = format!("--watchdog-action {told} --watchdog i6300esb ");
            assert!(line(&p).contains(&wanted), "{}", line(&p));
            assert!(check_watchdog(&p, false).is_ok());
            assert_eq!(check_watchdog(&p, true).is_err(), action == "restart");
            assert_eq!(restarts_hung_guests(&p), action == "restart");
        }
    }

    #[test]
    fn a_list_that_cannot_be_a_machines_disks_is_refused_with_its_reason() {
        let twice = "name=a,file=/a,format=raw;name=a,file=/b,format=raw";
        assert!(line(Some(twice)).is_err());
        assert!(disks(twice).unwrap_err().contains("another disk has its name"));
        assert!(disks("name=a,file=a,format=raw").unwrap_err().contains("absolute"));
    }
}
