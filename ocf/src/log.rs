//! Logging, where every destination may be absent.
//!
//! Lines go to stderr (which Pacemaker logs), to the system log when a facility is configured and `/dev/log` is there, and to
//! `HA_LOGFILE` when that is set. Nothing here can fail an action.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::environment::Environment;

/// How important a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The action fails.
    Error,
    /// Somebody should look.
    Warning,
    /// What was done.
    Info,
    /// Only with `HA_debug` set.
    Debug,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Warning => "WARNING",
            Self::Info => "INFO",
            Self::Debug => "DEBUG",
        }
    }
    /// Severity in the sense of RFC 5424, table 2.
    fn severity(self) -> u8 {
        match self {
            Self::Error => 3,
            Self::Warning => 4,
            Self::Info => 6,
            Self::Debug => 7,
        }
    }
}

/// Where this call's lines go.
#[derive(Debug, Clone, Default)]
pub struct Log {
    tag: String,
    facility: Option<u8>,
    file: Option<String>,
    debug: bool,
}

impl Log {
    /// As the environment configures it; `tag` says who speaks, e.g. `vmm(vm1)`.
    pub fn new(env: &Environment, tag: String) -> Self {
        let set = |names: &[&str]| {
            names.iter().filter_map(|n| env.variable(n)).find(|v| !v.is_empty() && *v != "none").map(str::to_owned)
        };
        let facility = set(&["HA_LOGFACILITY", "HA_logfacility"]).and_then(|name| facility_number(&name));
        let debug = env.variable("HA_debug").is_some_and(|v| !v.is_empty() && v != "0");
        Self { tag, facility, file: set(&["HA_LOGFILE"]).filter(|f| f != "/dev/null"), debug }
    }

    /// The action fails, or something that should not happen did.
    pub fn error(&self, text: impl AsRef<str>) {
        self.line(Level::Error, text.as_ref());
    }
    /// Somebody should look.
    pub fn warning(&self, text: impl AsRef<str>) {
        self.line(Level::Warning, text.as_ref());
    }
    /// What was done.
    pub fn info(&self, text: impl AsRef<str>) {
        self.line(Level::Info, text.as_ref());
    }
    /// Only with `HA_debug`.
    pub fn debug(&self, text: impl AsRef<str>) {
        if self.debug {
            self.line(Level::Debug, text.as_ref());
        }
    }

    fn line(&self, level: Level, text: &str) {
        let text = text.replace('\n', " ");
        let word = level.word();
        // A closed stderr, a missing /dev/log, a full disk: a line less, nothing worse.
        let _ = writeln!(std::io::stderr(), "{word}: {}: {text}", self.tag);
        if let Some(facility) = self.facility {
            let priority = facility * 8 + level.severity();
            let message = format!("<{priority}>{}[{}]: {word}: {text}", self.tag, std::process::id());
            let _ = UnixDatagram::unbound().and_then(|s| s.send_to(message.as_bytes(), "/dev/log"));
        }
        if let Some(file) = &self.file {
            let line = format!("{} {}[{}]: {word}: {text}\n", now_utc(), self.tag, std::process::id());
            let _ =
                OpenOptions::new().append(true).create(true).open(file).and_then(|mut f| f.write_all(line.as_bytes()));
        }
    }
}

/// Facility numbers of RFC 5424, table 1.
fn facility_number(name: &str) -> Option<u8> {
    Some(match name.to_ascii_lowercase().as_str() {
        "kern" => 0,
        "user" => 1,
        "daemon" => 3,
        "auth" => 4,
        "syslog" => 5,
        "cron" => 9,
        local => 16 + local.strip_prefix("local")?.parse::<u8>().ok().filter(|n| *n < 8)?,
    })
}

/// Now, as RFC 3339 in UTC with milliseconds.
fn now_utc() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = civil_from_days(seconds / 86_400);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z", since.subsec_millis())
}

/// Gregorian date of a day counted from 1970-01-01: years that start in March make the leap day the last one.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (days, date) in [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (11_016, (2000, 2, 29)), (20_779, (2026, 11, 22))] {
            assert_eq!(civil_from_days(days), date);
        }
    }

    #[test]
    fn a_log_file_that_cannot_be_written_fails_nothing() {
        let env = Environment::from_pairs([("HA_LOGFILE", "/nonexistent/log"), ("HA_LOGFACILITY", "local9")]);
        Log::new(&env, "test".into()).info("two\nlines");
    }

    #[test]
    fn a_log_file_gets_one_line_per_message() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        let env = Environment::from_pairs([("HA_LOGFILE", file.to_str().unwrap())]);
        Log::new(&env, "vmm(vm1)".into()).warning("two\nlines");
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.ends_with("WARNING: two lines\n") && text.contains("vmm(vm1)["), "{text}");
    }
}
