//! Building a machine: KVM, RAM, interrupt controllers, vCPUs, devices. Nothing runs afterwards.

use super::*;
use crate::sys;

impl Machine {
    /// Build everything; nothing runs. Events go to `events`.
    pub fn build(config: MachineConfig, events: Sender<Event>) -> Result<Self> {
        ensure!((1..=MAX_VCPUS).contains(&config.vcpus), "a machine has 1 to {MAX_VCPUS} vCPUs, not {}", config.vcpus);
        config.serial.iter().chain(&config.console).try_for_each(BackendConfig::validate)?;
        ensure!(config.serial.len() <= 4, "a machine has at most 4 serial ports");
        storage::validate(&config.disks)?;
        check_cdroms(&config.cdroms, &config.disks)?;
        nic::check_list(&config.nics)?;
        if let BootSource::Linux { kernel, initrd, cmdline } = &config.boot {
            LinuxBoot::open(kernel, initrd.as_deref(), cmdline)?;
        }
        // Now, not at a takeover: an administrator who forgot the bridge is to learn of it when the standby starts.
        let ports = net::open(&config.name, &config.nics)?;
        let kvm = open_kvm()?;
        let ram = Ram::open(&config.ram_file, config.memory_mib)?;
        let vm = kvm.create_vm().context("KVM refuses to create a machine")?;
        // Three pages that Intel's virtualisation needs, out of the guest's way, below the BIOS at 4 GiB.
        vm.set_identity_map_address(0xfffb_c000).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.set_tss_address(0xfffb_d000).context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().context("KVM does not offer its interrupt controllers")?;
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
            .context("KVM does not offer its timer (PIT)")?;
        routing::set(&vm)?;
        let manual_log = sys::manual_dirty_log(&vm);
        ram.attach(&vm, false)?;

        let offered = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .context("KVM does not say which CPU features it supports")?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let cpuids: Vec<_> =
            (0..config.vcpus).map(|id| cpuid::for_vcpu(offered.as_slice(), id, config.vcpus, deadline)).collect();
        let mut fds = Vec::new();
        for (id, cpuid) in (0u64..).zip(&cpuids) {
            let fd = vm.create_vcpu(id).with_context(|| format!("KVM refuses to create vCPU {id}"))?;
            vcpu_state::set_cpuid(&fd, cpuid)?;
            fds.push(fd);
        }
        let listed = kvm.get_msr_index_list().context("KVM does not list its MSRs")?;
        let xsave = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let can = Arc::new(Abilities::probe(listed.as_slice(), xsave, &fds[0]));

        let mut hardware = Hardware::new(
            HardwareConfig {
                serial_ports: config.serial.len(),
                console: config.console.is_some(),
                disks: storage::shapes(&config.disks, config.vcpus),
                cdroms: storage::media::shapes(&config.cdroms),
                scsi_queues: config.vcpus as u16,
                nics: net::shapes(&config.name, &config.nics),
                watchdog: config.watchdog,
            },
            &ram,
        )?;
        hardware.connect_nics(&config.name, &config.nics, ports);
        let mut lanes: Vec<_> = hardware.disks.iter().map(|disk| disk.lane.clone()).collect();
        let drives = Drives::new(&config.cdroms, lanes.split_off(config.disks.len()));
        let storage = Storage::new(&config.name, &config.node, &config.disks, lanes);
        let core = Arc::new(Core::new(config.name.clone(), vm, ram, manual_log, hardware, events));
        let vcpus = Vcpus::start(fds, &core)?;
        let cpuids = Arc::new(cpuids);
        let pristine = {
            let (can, cpuids) = (can.clone(), cpuids.clone());
            Pristine {
                vcpus: vcpus.on_all(move |id, fd| vcpu_state::save(fd, &can, &cpuids[id]))?,
                vm: vm_state::save(&core.vm)?,
            }
        };
        core.start_timer()?;
        let life = Life {
            state: VmmState::Standby,
            generation: Generation::ZERO,
            born: Generation::ZERO,
            cutting: false,
            session: false,
            last_cut: Epoch::ZERO,
            last_committed: Epoch::ZERO,
            resets: 0,
            pauses: VecDeque::new(),
            paused: None,
        };
        Ok(Self {
            core,
            vcpus,
            config,
            can,
            cpuids: Mutex::new(cpuids),
            pristine,
            life: Mutex::new(life),
            life_changed: Condvar::new(),
            nic_workers: Mutex::default(),
            pumps: Mutex::new(Vec::new()),
            storage,
            drives,
            kvm_backend: kvm_backend(),
            capture: Mutex::default(),
        })
    }
}

fn open_kvm() -> Result<Kvm> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) if e.errno() == libc::ENOENT => {
            bail!("/dev/kvm does not exist: load kvm_intel or kvm_amd, and enable virtualisation in the firmware")
        }
        Err(e) if e.errno() == libc::EACCES => {
            bail!("/dev/kvm may not be opened: run as root or as a member of the group kvm")
        }
        Err(e) => return Err(anyhow::Error::from(e).context("cannot open /dev/kvm")),
    };
    ensure!(kvm.get_api_version() == 12, "/dev/kvm is not KVM (API version {}, not 12)", kvm.get_api_version());
    Ok(kvm)
}

/// Which KVM module is in use.
fn kvm_backend() -> String {
    ["kvm_amd", "kvm_intel", "kvm_pvm"]
        .into_iter()
        .find(|m| Path::new("/sys/module").join(m).exists())
        .unwrap_or("kvm")
        .to_owned()
}
