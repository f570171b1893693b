//! `understudy.key=value` on the kernel command line.

/// What can be set from outside. Unknown keys and unreadable values are reported in [`Params::complaints`], never fatal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// `understudy.serial`: the port with the lines.
    pub serial: String,
    /// `understudy.baud`: its speed, bits/s; one of termios' speeds from 9600 to 921600.
    pub baud: u32,
    /// `understudy.rate`: bytes/s that are written at most; 0: what the speed carries (a tenth of `baud`).
    pub rate: u64,
    /// `understudy.mem_mib`: size of the memory under test, MiB; 0: none.
    pub mem_mib: u64,
    /// `understudy.mem_batch`: pages that are verified and rewritten between two pauses, at least 1.
    pub mem_batch: u64,
    /// `understudy.mem_pause_us`: length of that pause, µs.
    pub mem_pause_us: u64,
    /// `understudy.report_ms`: how often C, R and M lines are written, ms.
    pub report_ms: u64,
    /// `understudy.disk`: the device with the databases; they are then all that it does, beside a little memory. Empty: none.
    pub disk: String,
    /// `understudy.net`: address and prefix length of its network card, `10.0.0.5/24`; servers on the `disk` are then all that it does. Empty: none.
    pub net: String,
    /// `understudy.ssh`: the public key (ed25519, base64) that may log in there.
    pub ssh: String,
    /// `understudy.bench`: a device to measure and do nothing else. What is on it is lost. Empty: none.
    pub bench: String,
    /// What was not understood.
    pub complaints: Vec<String>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            serial: "/dev/ttyS0".into(),
            baud: 115_200,
            rate: 0,
            mem_mib: 64,
            mem_batch: 8,
            // 8 pages every 2 ms: about 4,000 pages/s, all of the 64 MiB every four seconds.
            mem_pause_us: 2_000,
            report_ms: 500,
            disk: String::new(),
            net: String::new(),
            ssh: String::new(),
            bench: String::new(),
            complaints: Vec::new(),
        }
    }
}

impl Params {
    /// Read the kernel command line.
    pub fn parse(cmdline: &str) -> Self {
        let mut params = Self::default();
        for word in cmdline.split_whitespace() {
            let Some((key, value)) = word.strip_prefix("understudy.").and_then(|w| w.split_once('=')) else { continue };
            if !params.set(key, value) {
                params.complaints.push(format!("{word} is not understood and was ignored"));
            }
        }
        params
    }

    fn set(&mut self, key: &str, value: &str) -> bool {
        fn put<T: std::str::FromStr + PartialOrd>(slot: &mut T, value: &str, low: T, high: T) -> bool {
            match value.parse() {
                Ok(v) if v >= low && v <= high => {
                    *slot = v;
                    true
                }
                _ => false,
            }
        }
        match key {
            "serial" if value.starts_with("/dev/") => {
                self.serial = value.into();
                true
            }
            "disk" if value.starts_with("/dev/") => {
                self.disk = value.into();
                true
            }
            "net" if value.split_once('/').is_some_and(|(ip, _)| ip.parse::<std::net::IpAddr>().is_ok()) => {
                self.net = value.into();
                true
            }
            "ssh" if value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=')) => {
                self.ssh = value.into();
                true
            }
            "bench" if value.starts_with("/dev/") => {
                self.bench = value.into();
                true
            }
            "baud" => put(&mut self.baud, value, 9_600, 921_600),
            "rate" => put(&mut self.rate, value, 0, 10_000_000),
            "mem_mib" => put(&mut self.mem_mib, value, 0, 1 << 20),
            "mem_batch" => put(&mut self.mem_batch, value, 1, 1 << 20),
            "mem_pause_us" => put(&mut self.mem_pause_us, value, 0, 60_000_000),
            "report_ms" => put(&mut self.report_ms, value, 10, 60_000),
            _ => false,
        }
    }

    /// Bytes/s that are written at most. A byte takes ten bit times on the line (8N1).
    pub fn bytes_per_second(&self) -> u64 {
        if self.rate > 0 { self.rate } else { u64::from(self.baud) / 10 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_from_the_kernel_command_line() {
        let p = Params::parse("console=ttyS1 understudy.mem_mib=16 quiet understudy.mem_pause_us=50\n");
        assert_eq!((p.mem_mib, p.mem_pause_us, p.baud), (16, 50, 115_200));
        assert!(p.complaints.is_empty());
        assert_eq!(p.bytes_per_second(), 11_520);
    }

    #[test]
    fn an_address_and_a_key_are_taken_as_what_they_are() {
        let p =
            Params::parse("understudy.net=10.0.0.5/24 understudy.ssh=AAAA/b+c= understudy.net=x/24 understudy.ssh=a;b");
        assert_eq!((p.net.as_str(), p.ssh.as_str(), p.complaints.len()), ("10.0.0.5/24", "AAAA/b+c=", 2));
    }

    #[test]
    fn nonsense_is_ignored_and_said() {
        let p =
            Params::parse("understudy.mem_mib=lots understudy.mem_batch=0 understudy.colour=red understudy.serial=x");
        assert_eq!(p.complaints.len(), 4);
        assert_eq!(Params { complaints: Vec::new(), ..p }, Params::default());
    }
}
