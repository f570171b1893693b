//! Linux at the SCSI controller: Debian's own drivers look at disk and drive, use them, and see what happens to them.
//!
//! The guest is made of the lab root's own programs: bash, util-linux, and Debian's kernel with `virtio_scsi`, `sd_mod`, `sr_mod`. It says on its serial port
//! what it finds; this test answers at the machine's command line.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs::{Cpio, Kernel, find_kernel, read_module, resolve_modules};
use crate::iso;
use crate::lab::wait::wait_until;
use crate::lab::{host, places};

/// What [`linux`] proves. It needs no cluster.
pub const LINUX: &str =
    "Linux reads, writes, discards and flushes a SCSI disk, mounts a CD, sees a disk grow and media change";

const MODULES: [&str; 7] = ["virtio_pci", "virtio_scsi", "sd_mod", "sr_mod", "sg", "isofs", "nls_utf8"];
const PROGRAMS: [&str; 15] = [
    "bash",
    "cat",
    "cmp",
    "dd",
    "head",
    "kmod",
    "mkdir",
    "mknod",
    "mount",
    "sleep",
    "sync",
    "umount",
    "blkdiscard",
    "blockdev",
    "tr",
];
/// Looks deeper into the commands where it is installed.
const DEEPER: [&str; 13] = [
    "sg_inq",
    "sg_vpd",
    "sg_readcap",
    "sg_opcodes",
    "sg_luns",
    "sg_modes",
    "sg_turs",
    "sg_verify",
    "sg_write_same",
    "sg_unmap",
    "sg_reset",
    "sg_get_config",
    "sg_sync",
];
const BOUND: Duration = Duration::from_secs(240);
const MIB: u64 = 1 << 20;

const INIT: &str = r#"#!/bin/bash
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null
exec >/dev/ttyS0 2>&1 </dev/null
say() { echo "SAYS $*"; }
# (Not switched off here: what the port has not sent yet would be lost.)
end() { say "$@"; while :; do sleep 60; done; }
must() { "$@" || end "FAILED: $*"; }
until_() { for ((i = 0; i < 600; i++)); do "$@" 2>/dev/null && return; sleep 0.2; done; end "FAILED: never: $*"; }
while read -r module; do /bin/insmod "$module" || say "not loaded: $module"; done </modules
until_ test -b /dev/sda
until_ test -b /dev/sr0
cd /sys/block/sda
# (Linux asks for some of these after the disk is there.)
write_back() { [[ $(cat device/scsi_disk/*/cache_type) == "write back" ]]; }
until_ write_back
say disk "$(tr -d '\n' <device/vendor)" "$(tr -d '\n' <device/model)" type "$(cat device/type)" sectors "$(cat size)"
say cache "$(cat device/scsi_disk/*/cache_type)" fua "$(cat device/scsi_disk/*/FUA)" thin "$(cat device/scsi_disk/*/provisioning_mode)"
say blocks "$(cat queue/logical_block_size)" "$(cat queue/physical_block_size)" rotational "$(cat queue/rotational)"
say limits "$(cat queue/max_hw_sectors_kb)" "$(cat queue/discard_max_hw_bytes)" "$(cat queue/write_zeroes_max_bytes)" "$(cat queue/nr_hw_queues 2>/dev/null)"
cd /
must dd if=/dev/urandom of=/tmp/random bs=1M count=4 status=none
must dd if=/tmp/random of=/dev/sda bs=1M seek=1 oflag=direct conv=fsync status=none
must dd if=/tmp/random of=/dev/sda bs=512 seek=20001 count=3 oflag=direct,sync status=none
must dd if=/dev/sda of=/tmp/back bs=1M skip=1 count=4 iflag=direct status=none
must cmp /tmp/random /tmp/back
say "what was written is read"
must blkdiscard -o 1M -l 2M /dev/sda
must blkdiscard -z -o 3M -l 1M /dev/sda
must dd if=/dev/sda of=/tmp/back bs=1M skip=1 count=4 iflag=direct status=none
must cmp -n 3145728 /tmp/back /dev/zero
must cmp -i 3145728 /tmp/random /tmp/back
say "what was given back reads as zeroes"
if [[ -x /bin/sg_inq ]]; then
  for unit in /dev/sda /dev/sr0; do
    for looks in "sg_inq" "sg_vpd" "sg_vpd -p di" "sg_vpd -p sn" "sg_opcodes" "sg_luns" "sg_modes -a" "sg_turs" "sg_readcap"; do
      echo "== $looks $unit"; $looks $unit && say "fine: $looks $unit" || say "not fine ($?): $looks $unit"
    done
  done
  for looks in "sg_vpd -p bl" "sg_vpd -p bdc" "sg_vpd -p lbpv" "sg_readcap --16" "sg_verify --lba=0 --count=64" "sg_verify --16 --lba=8 --count=8" \
    "sg_write_same --10 --lba=40000 --num=16 --in=/dev/zero --xferlen=512" "sg_write_same --16 --unmap --lba=40000 --num=16 --xferlen=512 --in=/dev/zero" \
    "sg_unmap --lba=40000 --num=8 --force" "sg_reset --device"; do
    echo "== $looks"; $looks /dev/sda && say "fine: $looks" || say "not fine ($?): $looks"
  done
  sg_get_config /dev/sr0 && say "fine: sg_get_config" || say "not fine ($?): sg_get_config"
fi
say disc sectors "$(cat /sys/block/sr0/size)" type "$(cat /sys/block/sr0/device/type)"
must mount -t iso9660 -o ro /dev/sr0 /mnt
say mounted "$(cat /mnt/hello.txt)"
grown() { [[ $(cat /sys/block/sda/size) == 196608 ]]; }
until_ grown
say grown "$(cat /sys/block/sda/size)"
must dd if=/tmp/random of=/dev/sda bs=1M seek=90 count=4 oflag=direct conv=fsync status=none
must umount /mnt
say unmounted
gone() { ! dd if=/dev/sr0 of=/dev/null bs=2048 count=1 status=none; }
until_ gone
say "the drive is empty"
until_ mount -t iso9660 -o ro /dev/sr0 /mnt
say another "$(head -c 15 /mnt/hello.txt)" and "$(cat /mnt/hello.txt | tr -d " " | head -c 99)"
end finished
"#;

struct Machine {
    vmm: Child,
    dir: PathBuf,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

impl Machine {
    /// The lines that are there to their end.
    fn said(&self) -> String {
        let said = String::from_utf8_lossy(&fs::read(self.dir.join("com1")).unwrap_or_default()).replace('\r', "");
        said.rfind('\n').map_or_else(String::new, |end| said[..=end].to_owned())
    }

    /// Wait until the guest says this; the rest of its line.
    fn says(&mut self, what: &str) -> Result<String> {
        let start = format!("SAYS {what}");
        let find = |said: &str| said.lines().find_map(|line| Some(line.split_once(&start)?.1.trim().to_owned()));
        wait_until(&format!("the guest says {what:?}"), BOUND, || {
            let said = self.said();
            if let Some((_, why)) = said.split_once("SAYS FAILED") {
                bail!("the guest failed{}", why.lines().next().unwrap_or_default());
            }
            if find(&said).is_none()
                && let Some(status) = self.vmm.try_wait()?
            {
                bail!("the machine has ended ({status})");
            }
            Ok(find(&said).is_some())
        })
        .with_context(|| tail(&self.said()))?;
        Ok(find(&self.said()).unwrap_or_default())
    }

    fn command(&self, words: &[&str]) -> Result<std::process::Output> {
        let mut command = vmm()?;
        let (verb, rest) = words.split_first().context("a command")?;
        command.arg(verb).args(["--machine", "scsi"]).args(roots(&self.dir)).args(rest);
        command.output().context("running understudy-vmm")
    }

    fn done(&self, words: &[&str]) -> Result<()> {
        let out = self.command(words)?;
        ensure!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }
}

fn tail(said: &str) -> String {
    let lines: Vec<_> = said.lines().collect();
    format!("the last that it said: {}", lines[lines.len().saturating_sub(12)..].join("\n"))
}

fn vmm() -> Result<Command> {
    Ok(Command::new(places::bin_dir()?.join("understudy-vmm")))
}

fn roots(dir: &Path) -> [String; 4] {
    let text = |name: &str| dir.join(name).display().to_string();
    ["--run-root".into(), text("run"), "--shm-root".into(), text("shm")]
}

/// See [`LINUX`].
pub fn linux() -> Result<()> {
    let dir = PathBuf::from(format!("/dev/shm/understudy-scsi-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let result = play(&dir);
    let _ = fs::copy(dir.join("com1"), places::out_dir()?.join("scsi-guest.log"));
    let _ = fs::remove_dir_all(&dir);
    result
}

fn play(dir: &Path) -> Result<()> {
    let kernel = find_kernel(Path::new("/"))?;
    fs::write(dir.join("initrd"), guest(&kernel)?)?;
    File::create(dir.join("disk"))?.set_len(64 * MIB)?;
    fs::write(dir.join("1.iso"), iso::image("ONE", b"the first disc"))?;
    fs::write(dir.join("2.iso"), iso::image("TWO", &[b"the second disc".as_slice(), &[b' '; 9000]].concat()))?;
    let path = |name: &str| dir.join(name).display().to_string();
    let mut command = vmm()?;
    command.args(["run", "--machine", "scsi", "--memory", "256", "--vcpus", "1"]).args(roots(dir));
    command.arg("--kernel").arg(&kernel.vmlinuz).arg("--initrd").arg(dir.join("initrd"));
    command.args(["--cmdline", "console=ttyS0 quiet panic=-1", "--serial0", &format!("file:{}", path("com1"))]);
    command.args(["--disk", &format!("name=sda,file={},format=raw,bus=scsi", path("disk"))]);
    command.args(["--cdrom", &format!("name=cd0,file={}", path("1.iso"))]);
    let log = File::create(dir.join("vmm.log"))?;
    let vmm = command.stdout(Stdio::null()).stderr(log).spawn().context("starting understudy-vmm")?;
    let mut machine = Machine { vmm, dir: dir.to_owned() };

    let expected = [
        ("disk", "UNDRSTDY DISK type 0 sectors 131072"),
        ("cache", "write back fua 1 thin unmap"),
        ("blocks", "512 4096 rotational 0"),
    ];
    for (what, wanted) in expected {
        let said = machine.says(what)?;
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(said == wanted, "the guest sees {what} {said}, not {wanted}");
    }
    machine.says("what was written is read")?;
    machine.says("what was given back reads as zeroes")?;
    let disc = machine.says("disc")?;
    ensure!(disc == "sectors 88 type 5", "the guest sees a disc {disc}");
    ensure!(machine.says("mounted")? == "the first disc", "another content");
    // While it is mounted the drive is locked.
    let refused = machine.command(&["eject", "cd0"])?;
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && why.contains("locked the drive"), "a mounted medium came out: {why}");
    machine.done(&["resize", "sda", "96M"])?;
    machine.says("grown")?;
    machine.says("unmounted")?;
    wait_until("the drive is let go of", BOUND, || Ok(machine.command(&["eject", "cd0"])?.status.success()))?;
    machine.says("the drive is empty")?;
    machine.done(&["insert", "cd0", &path("2.iso")])?;
    let another = machine.says("another")?;
    ensure!(another == "the second disc and theseconddisc", "the second disc has {another:?}");
    machine.says("finished")?;
    machine.done(&["quit"])?;
    wait_until("the machine is off", BOUND, || Ok(machine.vmm.try_wait()?.is_some()))?;
    let size = fs::metadata(dir.join("disk"))?.len();
    ensure!(size == 96 * MIB, "the disk has {size} bytes");
    let disk = fs::read(dir.join("disk"))?;
    let (first, last) = (&disk[4 * MIB as usize..][..MIB as usize], &disk[93 * MIB as usize..][..MIB as usize]);
    ensure!(first == last && first.iter().any(|byte| *byte != 0), "what was written is not on the disk");
    Ok(())
}

/// The initramfs: programs with what they are linked to, modules in load order.
fn guest(kernel: &Kernel) -> Result<Vec<u8>> {
    let mut cpio = Cpio::new();
    for directory in ["bin", "dev", "proc", "sys", "mnt", "tmp"] {
        cpio.directory(directory);
    }
    cpio.character_device("dev/console", 0o600, 5, 1);
    cpio.character_device("dev/null", 0o666, 1, 3);
    let mut libraries = std::collections::BTreeSet::new();
    let deeper: Vec<_> = DEEPER.into_iter().filter(|name| find_program(name).is_some()).collect();
    for name in PROGRAMS.into_iter().chain(deeper) {
        let file = find_program(name).with_context(|| format!("the lab root has no {name}"))?;
        cpio.file(&format!("bin/{name}"), 0o755, &fs::read(&file)?);
        let listed = host::run_quiet(Command::new("ldd").arg(&file))?;
        libraries.extend(listed.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    cpio.symlink("bin/insmod", "kmod");
    for library in libraries {
        cpio.file(&library, 0o755, &fs::read(&library).with_context(|| library.clone())?);
    }
    let read = |name: &str| fs::read_to_string(kernel.modules.join(name)).with_context(|| name.to_owned());
    let resolved = resolve_modules(&read("modules.dep")?, &read("modules.builtin").unwrap_or_default(), &MODULES);
    ensure!(resolved.missing.is_empty(), "the kernel has no {:?}", resolved.missing);
    let mut list = String::new();
    for (i, path) in resolved.load.iter().enumerate() {
        let inside = format!("/lib/modules/{i}.ko");
        cpio.file(&inside, 0o644, &read_module(&kernel.modules.join(path))?);
        list += &format!("{inside}\n");
    }
    cpio.file("modules", 0o644, list.as_bytes());
    cpio.file("init", 0o755, INIT.as_bytes());
    Ok(cpio.finish())
}

fn find_program(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
        .into_iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.exists())
}
