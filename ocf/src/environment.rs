//! What the cluster tells an agent: the environment variables, taken once and then never looked at again.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::action::Action;

/// A snapshot of the environment variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

impl Environment {
    /// This process's. Bytes that are not UTF-8 are replaced.
    pub fn from_process() -> Self {
        let text = |s: std::ffi::OsString| s.to_string_lossy().into_owned();
        Self { variables: std::env::vars_os().map(|(k, v)| (text(k), text(v))).collect() }
    }

    /// From pairs, for tests.
    pub fn from_pairs<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        Self { variables: pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect() }
    }

    /// Any variable.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// A resource parameter. An empty value counts as unset, as everywhere in OCF.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.variable(&format!("OCF_RESKEY_{name}")).filter(|v| !v.is_empty())
    }

    /// A meta-attribute or operation property of Pacemaker, e.g. `timeout`, `on_node`, `clone_max`.
    pub fn meta(&self, name: &str) -> Option<&str> {
        self.variable(&format!("OCF_RESKEY_CRM_meta_{name}")).filter(|v| !v.is_empty())
    }

    /// Whether Pacemaker runs us (rather than a person or `ocf-tester`): it always passes its feature set.
    pub fn under_pacemaker(&self) -> bool {
        self.variable("OCF_RESKEY_crm_feature_set").is_some()
    }

    /// Name of the instance, e.g. `vm1` or, in a clone, `vm1:0`.
    pub fn instance(&self) -> &str {
        self.variable("OCF_RESOURCE_INSTANCE").filter(|v| !v.is_empty()).unwrap_or("default")
    }

    /// Name of the primitive: the instance's name without the clone number.
    pub fn resource(&self) -> &str {
        let instance = self.instance();
        match instance.rsplit_once(':') {
            Some((name, number)) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => instance,
        }
    }

    /// Whether this is an instance of a clone.
    pub fn is_clone(&self) -> bool {
        ["clone", "clone_max", "promoted_max", "master_max"].iter().any(|m| self.meta(m).is_some())
            || self.meta("promotable").is_some_and(|v| v.eq_ignore_ascii_case("true"))
    }

    /// This node's name to the cluster, or the host name when no cluster told us.
    pub fn node(&self) -> String {
        if let Some(node) = self.meta("on_node") {
            return node.to_owned();
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        match host.trim() {
            "" => "localhost".to_owned(),
            name => name.to_owned(),
        }
    }

    /// The operation's timeout; `None` when nobody set one.
    pub fn timeout(&self) -> Option<Duration> {
        let ms: u64 = self.meta("timeout")?.parse().ok()?;
        (ms > 0).then(|| Duration::from_millis(ms))
    }

    /// The operation's interval, zero for a single one.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.meta("interval").and_then(|v| v.parse().ok()).unwrap_or(0))
    }

    /// Whether this is the question "does it run here?" that a cluster asks of every node.
    pub fn is_probe(&self, action: Action) -> bool {
        action == Action::Monitor && self.interval().is_zero()
    }

    /// `OCF_CHECK_LEVEL`, 0 if unset or not a number.
    pub fn check_level(&self) -> u32 {
        self.variable("OCF_CHECK_LEVEL").and_then(|v| v.parse().ok()).unwrap_or(0)
    }

    /// Whether `ocf-tester` asks us to behave as if the helper programs were not installed.
    pub fn pretend_binaries_missing(&self) -> bool {
        self.variable("OCF_TESTER_FAIL_HAVE_BINARY").is_some_and(|v| !v.is_empty())
    }

    /// Where to look for programs: `PATH`, or the usual directories when there is none.
    pub fn search_path(&self) -> &str {
        self.variable("PATH").filter(|p| !p.is_empty()).unwrap_or("/usr/sbin:/usr/bin:/sbin:/bin")
    }

    /// All variables whose name starts with `prefix`, without it.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.variables.iter().filter_map(move |(k, v)| Some((k.strip_prefix(prefix)?, v.as_str())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_without_interval_is_a_probe() {
        let none = Environment::default();
        let zero = Environment::from_pairs([("OCF_RESKEY_CRM_meta_interval", "0")]);
        let ten = Environment::from_pairs([("OCF_RESKEY_CRM_meta_interval", "10000")]);
        assert!(none.is_probe(Action::Monitor) && zero.is_probe(Action::Monitor));
        assert!(!ten.is_probe(Action::Monitor) && !zero.is_probe(Action::Start));
    }

    #[test]
    fn the_clone_number_is_no_part_of_the_resource() {
        for (instance, resource) in [("vm:0", "vm"), ("vm:12", "vm"), ("vm", "vm"), ("a:b", "a:b"), ("a:", "a:")] {
            assert_eq!(Environment::from_pairs([("OCF_RESOURCE_INSTANCE", instance)]).resource(), resource);
        }
    }

    #[test]
    fn an_empty_parameter_is_unset() {
        let env = Environment::from_pairs([("OCF_RESKEY_a", ""), ("OCF_RESKEY_b", "x")]);
        assert_eq!((env.parameter("a"), env.parameter("b"), env.parameter("c")), (None, Some("x"), None));
    }

    #[test]
    fn without_path_the_system_directories_are_searched() {
        assert!(Environment::default().search_path().contains("/usr/sbin"));
    }
}
